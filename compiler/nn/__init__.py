# SPDX-License-Identifier: Apache-2.0
"""What happens in torch before a network is compiled: pruning, and layers of the families that need their own training.

Each module is imported on its own (`from compiler.nn import pruning`); importing this package loads no torch.
"""

from __future__ import annotations
