# SPDX-License-Identifier: Apache-2.0
"""DeepSparse as an engine of `tools/bench_peers.py`, in an interpreter of its own: it needs older packages than Kerf.

    python -m venv deepsparse && deepsparse/bin/pip install deepsparse==1.8.0 sparsezoo==1.8.0 'numpy<2'
    python tools/bench_peers.py resnet50 --builds dense,pruned --deepsparse deepsparse/bin/python

Run by that interpreter this file is the engine: it answers every byte it reads with a byte, after a run of the model.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

_READY, _RUN, _QUIT = b"r", b"g", b"q"


class DeepSparse:
    """An engine in a child process; a call is one run there. The time of a call holds some 0.1 ms of the way to it.

    Raises SystemExit if the interpreter has no DeepSparse or DeepSparse cannot run the model.
    """

    def __init__(self, python: Path, model: Path, inputs, threads: int):
        import numpy as np

        with tempfile.TemporaryDirectory() as scratch:
            given, answered = Path(scratch) / "inputs.npz", Path(scratch) / "outputs.npz"
            np.savez(given, *inputs)
            ask, self._ask = os.pipe()
            self._answer, answer = os.pipe()
            line = [str(python), __file__, str(model), str(given), str(answered), str(threads)]
            self._process = subprocess.Popen(
                [*line, str(ask), str(answer)], pass_fds=(ask, answer), stdout=subprocess.DEVNULL
            )
            os.close(ask)
            os.close(answer)
            if os.read(self._answer, 1) != _READY:
                raise SystemExit(f"{python} cannot run {model} with DeepSparse")
            with np.load(answered) as file:
                self.outputs = [file[f"arr_{i}"] for i in range(len(file.files))]

    def __call__(self) -> None:
        os.write(self._ask, _RUN)
        if os.read(self._answer, 1) != _RUN:
            raise SystemExit("DeepSparse stopped in the middle of a measurement")

    def close(self) -> None:
        os.write(self._ask, _QUIT)
        self._process.wait()
        os.close(self._ask)
        os.close(self._answer)


def serve(model: str, given: str, answered: str, threads: int, ask: int, answer: int) -> None:
    """The child: one core per thread, synchronous, batch 1."""
    import numpy as np
    from deepsparse import compile_model

    with np.load(given) as file:
        arrays = [np.ascontiguousarray(file[f"arr_{i}"]) for i in range(len(file.files))]
    engine = compile_model(model, batch_size=len(arrays[0]), num_cores=threads)
    np.savez(answered, *engine.run(arrays))
    os.write(answer, _READY)
    while os.read(ask, 1) == _RUN:
        engine.run(arrays)
        os.write(answer, _RUN)


if __name__ == "__main__":
    _model, _given, _answered, *_numbers = sys.argv[1:]
    serve(_model, _given, _answered, *map(int, _numbers))
