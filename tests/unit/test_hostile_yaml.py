"""A hundred malformed YAML files: each is one line and exit status 2, in bounded memory and time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_hgpt.safe_yaml import MAX_CHARACTERS, parse_yaml

ROOT = Path(__file__).parents[2]


def bomb(levels: int, width: int, unit: str = "[{}]") -> str:
    """Lists (or what `unit` makes) of aliases of lists of aliases …: width ** levels values."""
    lines = ["a0: &a0 " + unit.format(", ".join(["x"] * width))]
    lines += [f"a{i}: &a{i} " + unit.format(", ".join([f"*a{i - 1}"] * width)) for i in range(1, levels)]
    return "\n".join(lines)


def merges(levels: int) -> str:
    """Mappings merged into mappings, twice each: 2 ** levels pairs, which PyYAML writes out."""
    lines = ["m0: &m0 {k0: 1}"]
    lines += [f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}], k{i}: 1}}" for i in range(1, levels)]
    return "\n".join(lines)


TEXTS: dict[str, str | bytes] = {
    **{f"bomb {levels} x {width}": bomb(levels, width) for levels, width in ((9, 9), (20, 2), (6, 100), (40, 40))},
    **{f"bomb of mappings {n}": bomb(n, 2, "{{p: [{}]}}") for n in (18, 60)},
    **{f"merges {levels}": merges(levels) for levels in (18, 40, 200)},
    "a list in itself": "a: &a [*a]",
    "a mapping in itself": "a: &a {b: *a}",
    "a mapping as its key": "&a ? *a : 1",
    "itself at depth": "a: &a [[[{b: [*a]}]]]",
    "a section in itself": "training: &t {seed: *t}",
    "merged into itself": "a: &a {<<: *a}",
    **{f"{n} brackets": "[" * n for n in (10, 1000, 100_000)},
    **{f"{n} closed brackets": "[" * n + "]" * n for n in (200, 2000, 100_000)},
    **{f"{n} braces": "{a: " * n + "1" + "}" * n for n in (200, 2000)},
    **{f"{n} dashes": "- " * n + "x" for n in (500, 5000)},
    **{f"{n} keys in keys": "? " * n + "x" for n in (500, 5000)},
    "an indented staircase": "\n".join(" " * i + f"k{i}:" for i in range(600)),
    "too large": "a: " + "x" * MAX_CHARACTERS,
    "a long text": "name: " + "x" * 70_000,
    "many values": "data: {train: [" + "a, " * 60_000 + "a]}",
    "many unknown keys": "\n".join(f"k{i}: 1" for i in range(30_000)),
    "many unknown keys of a section": "training: {" + ", ".join(f"k{i}: 1" for i in range(20_000)) + "}",
    "many empty lists": "a: [" + "[]," * 60_000 + "]",
    "a long key": "k" * 1000 + ": 1",
    "a longer key": "? " + "k" * 100_000 + "\n: 1",
    "a key of two lines": '"a\\nb": 1',
    "a key of a list": "? [a, b]\n: 1",
    "a key of a mapping": "? {a: b}\n: 1",
    "a number's key": "1: 2",
    "no key": "? \n: 1",
    "a key twice": "training: {seed: 1, seed: 2}",
    "a section twice": "training: {seed: 1}\ntraining: {seed: 2}",
    "a digit in a date": "name: 2020-13-45",
    "a date": "name: 2020-01-02",
    "a time": "name: 2020-01-02 03:04:05",
    "a number of hours": "training: {seed: " + ":".join(["1"] * 60) + "}",
    "hours of hours": "training: {seed: " + ":".join(["1"] * 30_000) + "}",
    "a long number": "training: {seed: " + "9" * 60_000 + "}",
    "a long hexadecimal": "training: {seed: 0x" + "f" * 60_000 + "}",
    "a long binary": "training: {seed: 0b" + "1" * 60_000 + "}",
    "a number of fifty digits": "training: {seed: " + "9" * 50 + "}",
    "a float beyond floats": "optimizer: {lr: 1.0e+999}",
    "no number": "optimizer: {lr: .nan}",
    "underscores": "training: {seed: 1" + "_" * 100 + "}",
    **{f"tag {tag}": f"name: {tag}" for tag in (
        '!!int ""', '!!int "x"', "!!int [1]", '!!float ""', '!!float "x"', '!!bool "x"', "!!null 5", "!!timestamp 5",
        "!!binary x", "!!binary [", "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!map [1]", "!!seq {a: 1}",
        "!!str [a]", "!!python/object/apply:os.system [id]", "!!python/name:os.system", "!!python/tuple [1]",
        "!!python/object/new:os.system [id]", "!local x", "!<tag:a,b:c> x", "! [", "!!merge x", "!!value x", "=")},
    "an alias of nothing": "name: *nowhere",
    "an anchor twice in a row": "name: &a &b x",
    "an anchor of nothing": "&",
    "no end of a list": "training: [",
    "no end of a mapping": "training: {seed: 1",
    "no end of a text": 'name: "abc',
    "a tab": "training:\n\tseed: 1",
    "mixed": "- a\nb: c",
    "two documents": "name: a\n---\nname: b",
    "an unknown version": "%YAML 9.9\n---\nname: 5",
    "an unknown directive": "%TAG ! !\n%TAG ! !\n---\nname: a",
    "a bad escape": r'name: "\q"',
    "half a character": r'name: "\ud800"',
    "a zero in a text": r'name: "a\0b"',
    "a zero in base": r'base: "a\0b"',
    "base of a folder": "base: .",
    "base of itself": "base: base_of_itself.yaml",
    "base of a device": "base: /dev/zero",
    "base of a list": "base: [a, b]",
    "preset of a path": "preset: ../../etc/passwd",
    "a list": "[a, b]",
    "a text": "text",
    "a number": "5",
    "sections of lists": "training: [1, 2]",
    "sections of texts": "model: x\ndata: y\noptimizer: z",
    "bytes": bytes(range(256)),
    "random bytes": b"\x8f\x12\xff\x00\x9a" * 1000,
    "utf-16": "name: 5".encode("utf-16"),
    "latin-1": "name: é".encode("latin-1"),
    "zeros": b"\0" * 5000,
    "a control character": b"name: a\x07b",
    "half a utf-8 character": b"name: \xe2\x82",
    "a png": b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00.",
}  # fmt: skip
"""What is wrong -> the file."""

EVERY_FILE = """
import io, json, re, sys, time
from contextlib import redirect_stderr, redirect_stdout
from megatron_hgpt.cli import main
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
with redirect_stdout(io.StringIO()):
    main(["config", "--preset", "tiny"])
before, results = peak(), []
for path in sys.argv[1:]:
    started, out, err = time.monotonic(), io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(["config", "--config", path])
    results.append([status, out.getvalue(), err.getvalue(), time.monotonic() - started])
print(json.dumps({"results": results, "before": before, "peak": peak()}))
"""


def test_a_hundred_malformed_files(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Peak memory of all of them, over that of reading a good configuration, is below 300 MiB; none takes 20 s."""
    assert len(TEXTS) >= 100
    paths = {}
    for name, text in TEXTS.items():
        paths[name] = tmp_path / f"{''.join(c if c.isalnum() else '_' for c in name)}.yaml"
        paths[name].write_bytes(text.encode() if isinstance(text, str) else text)
    done = subprocess.run(
        [sys.executable, "-c", EVERY_FILE, *map(str, paths.values())], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    for name, (status, out, err, seconds) in zip(TEXTS, report["results"], strict=True):
        lines = err.splitlines()
        assert (status, out) == (2, ""), name
        assert len(lines) == 1 or lines[0].endswith(" problems"), (name, err[:500])
        assert all(line.isprintable() and len(line) < 2000 for line in lines) and len(lines) < 60, (name, err[:500])
        assert seconds < 20, (name, seconds)
    record_property("malformed files", len(TEXTS))
    record_property("peak MiB over a good file's", report["peak"] - report["before"])
    assert report["peak"] - report["before"] < 300


PLAIN = [1, 2.5, "x", True, None]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: &a [1, 2.5, x, true, null]\nb: [*a, *a]", {"a": PLAIN, "b": [PLAIN, PLAIN]}),
        ("a: &a {k: 1}\nb: {<<: *a, l: 2}", {"a": {"k": 1}, "b": {"k": 1, "l": 2}}),
        ('"2020-01-02": "\\u00e9"', {"2020-01-02": "é"}),
    ],
)  # fmt: skip
def test_what_is_meant_is_still_read(text: str, value: object) -> None:
    assert parse_yaml(text) == value
