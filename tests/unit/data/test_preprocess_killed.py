"""A process that is killed in the middle of preprocessing leaves no dataset behind that could be mistaken for one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hgpt.data.mmap_format import DatasetReader
from megatron_hgpt.data.preprocess import Input, PreprocessOptions, preprocess
from megatron_hgpt.errors import DataError
from megatron_hgpt.text.tokenizer import TextTokenizer
from megatron_hgpt.text.vocabulary import Vocabulary

KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_hgpt.data import mmap_format, preprocess as module
from megatron_hgpt.text.tokenizer import TextTokenizer
from megatron_hgpt.text.vocabulary import Vocabulary

# Everything is written by now, only the rename is missing.
mmap_format.Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
folder = Path(sys.argv[1])
module.preprocess(
    [module.Input(path=folder / "records.json")],
    folder / "out",
    tokenizer=TextTokenizer.load(Path(sys.argv[2])),
    vocabulary=Vocabulary(text_size=400, num_codes=16),
    options=module.PreprocessOptions(template="phi3_instruct", num_indices=4),
)
"""


def test_a_killed_process_leaves_no_dataset(
    tmp_path: Path, sentencepiece_folder: Path, sentencepiece: TextTokenizer
) -> None:
    turns = [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "records.json").write_text(json.dumps([{"id": "a", "conversations": turns}]))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(sentencepiece_folder)]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(tmp_path.glob("out.tmp-*"))) == 1  # it had written
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="not a dataset folder"):
        DatasetReader(tmp_path / "out")
    preprocess(
        [Input(path=tmp_path / "records.json")],
        tmp_path / "out",
        tokenizer=sentencepiece,
        vocabulary=Vocabulary(text_size=400, num_codes=16),
        options=PreprocessOptions(template="phi3_instruct", num_indices=4),
    )
    assert len(DatasetReader(tmp_path / "out", verify_checksums=True)) == 1
