"""Files of every format hold the same rows, and none of them is trusted."""

from __future__ import annotations

import decimal
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest_cli import Done, spawn

from smoothl1_deploy import LossSpec, loss_over
from smoothl1_deploy.errors import InvalidInputError
from smoothl1_deploy.scoring import _sources as sources
from smoothl1_deploy.scoring._sources import Location, open_source

Cli = Callable[..., Done]
ROWS = np.arange(24, dtype=np.float32).reshape(8, 3)


def parquet(path: str, **columns: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as writer

    made = {}
    for name, values in columns.items():
        if isinstance(values, np.ndarray) and values.ndim == 2:
            flat = pyarrow.array(values.ravel())
            values = pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
        made[name] = values
    names = [name.rstrip() for name in made]  # 'input ' is a second column called so
    table = pyarrow.table(list(made.values()), names=names)
    writer.write_table(table, path, row_group_size=3)


def write(path: str, rows: np.ndarray) -> None:
    if path.endswith(".npy"):
        np.save(path, rows)
    elif path.endswith(".npz"):
        np.savez_compressed(path, other=rows[::-1], input=rows)
    else:
        parquet(path, other=rows[::-1], input=rows)


@pytest.mark.parametrize("path", ["a.npy", "a.npz", "a.parquet"])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:, 0].copy()], ids=["lists", "numbers"])
def test_rows_are_read_in_any_order(
    path: str, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_DECODED", 4)
    write(path, rows)
    source = open_source(Location(Path(path), "input"))
    assert (source.shape, source.dtype) == (rows.shape, rows.dtype)
    for start, stop in [(0, 2), (2, 7), (7, 8), (0, 8), (5, 6), (4, 8), (8, 8), (0, 0)]:
        assert np.array_equal(source.read(start, stop), rows[start:stop]), (start, stop)
    source.close()


@pytest.mark.parametrize("path", ["a.npy", "a.npz"])
def test_elements_are_read_as_rows(path: str) -> None:
    write(path, ROWS)
    source = open_source(Location(Path(path), "input"))
    assert source.can_flatten
    source.flatten()
    for start, stop in [(0, 5), (5, 24), (7, 8), (0, 24)]:
        assert np.array_equal(source.read(start, stop), ROWS.ravel()[start:stop])


@pytest.mark.parametrize("path", ["a.npy", "a.npz"])
def test_bfloat16_is_told_by_the_dtype(path: str) -> None:
    rows = ROWS.astype(ml_dtypes.bfloat16)
    write(path, rows)
    source = open_source(Location(Path(path), "input", dtype="bfloat16"))
    assert np.array_equal(source.read(1, 3), rows[1:3])
    with pytest.raises(
        InvalidInputError,
        match="two bytes, which is how|V2, which are no numbers of a loss; --dtype bfloat16",
    ):
        open_source(Location(Path(path), "input"))


@pytest.mark.parametrize("path", ["a.npy", "a.npz"])
def test_fortran_order_is_read(path: str) -> None:
    write(path, np.asfortranarray(ROWS))
    source = open_source(Location(Path(path), "input"))
    assert not source.can_flatten and np.array_equal(source.read(2, 7), ROWS[2:7])


def test_a_header_of_version_3_is_read() -> None:
    """numpy writes one where a name in the dtype is no Latin-1; anyone may write one."""
    with open("a.npy", "wb") as file:
        np.lib.format.write_array(file, ROWS, version=(3, 0))
    with zipfile.ZipFile("a.npz", "w") as archive:
        archive.write("a.npy", "input.npy")
    for name in ("a.npy", "a.npz"):
        assert np.array_equal(open_source(Location(Path(name), "input")).read(1, 5), ROWS[1:5])


def test_every_kind_of_parquet_is_read_by_a_process_of_its_own() -> None:
    """Lists went wrong there alone: a part of pyarrow was missing that a neighbour had imported."""
    pyarrow = pytest.importorskip("pyarrow")
    Path("shards").mkdir()
    number = pyarrow.float32()
    kinds = (pyarrow.list_(number), pyarrow.large_list(number), pyarrow.list_(number, 3))
    for shard, kind in enumerate(kinds):
        rows = pyarrow.array(ROWS.tolist(), kind)
        hits = pyarrow.array((ROWS > 4).tolist(), pyarrow.list_(pyarrow.bool_()))
        parquet(f"shards/{shard}.pq", input=rows, target=hits)
    done = spawn("score", "--input", "shards", "--target", "shards", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["loss"] == loss_over([(ROWS, ROWS > 4)], LossSpec()).loss


REFUSED = {
    "no.npy": "no.npy can't be read",
    "a.csv": "a.csv is none of .npy, .npz, .parquet",
    "text.npy": "text.npy is not a .npy file",
    "text.npz": "text.npz is not an .npz file; write it with numpy.savez, the arrays",
    "text.parquet": "text.parquet is not a Parquet file; write it with pyarrow",
    "scalar.npy": "scalar.npy has no axis",
    "scalar.npz": "input in scalar.npz has no axis",
    "words.npy": "words.npy holds <U1, which are no numbers",
    "objects.npz": "input in objects.npz holds Python objects, which are not loaded",
    "two.npz": "two.npz has no array called 'input', and more or less than one to choose; it has "
    "'a', 'b'. Name it with --input-name",
    "short.npz": "short.npz is truncated or damaged (input: 24 bytes where its header says 96)",
    "words.parquet": "input in words.parquet holds string; a loss needs numbers",
    "decimals.pq": "input in decimals.pq holds decimal128(2, 1); a loss needs numbers, or lists of "
    "numbers: make a column of them by cast, struct_field or list_flatten of pyarrow.compute",
    "struct.pq": "input in struct.pq holds struct<a: double>; a loss needs numbers",
    "nested.pq": "input in nested.pq holds list<element: list<element: double>>; a loss needs",
    "twins.pq": "twins.pq has 2 columns called 'input'; rename all but one",
    "two.parquet": "two.parquet has no column called 'input'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(name: str) -> None:
    for suffix in ("npy", "npz", "parquet"):
        Path(f"text.{suffix}").write_text("not an array")
    np.save("scalar.npy", np.float32(1))
    np.savez("scalar.npz", input=np.float32(1))
    np.save("words.npy", np.array(["a"]))
    np.savez("objects.npz", input=np.array([{}], dtype=object))
    np.savez("two.npz", a=ROWS, b=ROWS)
    buffer = io.BytesIO()
    np.save(buffer, ROWS)
    with zipfile.ZipFile("short.npz", "w") as archive:
        archive.writestr("input.npy", buffer.getvalue()[: 128 + 24])
    parquet("words.parquet", input=["a"])
    parquet("two.parquet", a=[1.0], b=[1.0])
    parquet("decimals.pq", input=[decimal.Decimal("1.5")])
    parquet("struct.pq", input=[{"a": 1.0}])
    parquet("nested.pq", input=[[[1.0]]])
    parquet("twins.pq", **{"input": [1.0], "input ": [1.0]})
    with pytest.raises(InvalidInputError) as caught:
        open_source(Location(Path(name), "input"))
    assert REFUSED[name] in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, None], "input in a.parquet has 1 null(s), which is also what pandas makes of NaN"),
        ([[1.0], [None]], "input in a.parquet has 1 null(s)"),
        ([[1.0], None], "input in a.parquet has 1 null(s)"),
        ([[1.0], [1.0, 2.0]], "has lists of different lengths; a loss needs rows of one length"),
    ],
)
def test_rows_of_parquet_that_are_refused(values: list[Any], message: str) -> None:
    parquet("a.parquet", input=values)
    source = open_source(Location(Path("a.parquet"), "input"))
    with pytest.raises(InvalidInputError) as caught:
        source.read(0, 2)
    assert message in str(caught.value)


def test_damage_within_the_rows_is_told() -> None:
    write("a.npz", ROWS)
    data = bytearray(Path("a.npz").read_bytes())
    with zipfile.ZipFile("a.npz") as archive:
        place = archive.getinfo("input.npy").header_offset
    data[place + 60 : place + 90] = bytes(30)
    Path("b.npz").write_bytes(data)
    with pytest.raises(InvalidInputError, match="b.npz is truncated or damaged"):
        open_source(Location(Path("b.npz"), "input")).read(0, 8)


# Shards ------------------------------------------------------------------------------------------


@pytest.fixture
def folders() -> None:
    rng = np.random.default_rng(0)
    for folder in ("p", "t"):
        Path(folder).mkdir()
        for shard in range(3):
            np.save(f"{folder}/{shard}.npy", rng.standard_normal((5, 2)).astype(np.float32))
    Path("p/.hidden.npy").write_text("")
    Path("p/_SUCCESS").write_text("")


FOLDERS = ("--input", "p", "--target", "t")


def test_shards_are_matched_by_name(cli: Cli, folders: None) -> None:
    found = json.loads(
        cli("score", *FOLDERS, "--per-sample", "-o", "s.npy", "--reduction", "sum", "--json").out
    )
    assert (found["shards"], found["count"]) == (3, 30)
    for name in ("p", "t"):
        np.save(f"{name}.npy", np.concatenate([np.load(f"{name}/{i}.npy") for i in range(3)]))
    whole = ("--input", "p.npy", "--target", "t.npy", "--reduction", "sum", "--per-sample")
    assert json.loads(cli("score", *whole, "-o", "w.npy", "--json").out)["loss"] == found["loss"]
    assert Path("s.npy").read_bytes() == Path("w.npy").read_bytes()


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_every_format_gives_the_same_result(cli: Cli, folders: None, suffix: str) -> None:
    expected = json.loads(cli("score", *FOLDERS, "--json").out)
    Path("both").mkdir()
    for shard in range(3):
        arrays = {"y": np.load(f"p/{shard}.npy"), "x": np.load(f"t/{shard}.npy")}
        if suffix == "npz":
            np.savez_compressed(f"both/{shard}.npz", **arrays)
        else:
            parquet(f"both/{shard}.parquet", **arrays)
    names = ("--input-name", "y", "--target-name", "x")
    found = json.loads(cli("score", "--input", "both", "--target", "both", *names, "--json").out)
    assert {k: found[k] for k in ("loss", "sum", "count", "shards")} == {
        k: expected[k] for k in ("loss", "sum", "count", "shards")
    }


def test_scores_in_parquet_are_those_in_npy(cli: Cli, folders: None) -> None:
    parquet_file = pytest.importorskip("pyarrow.parquet")
    for name in ("s.npy", "s.parquet"):
        assert cli("score", *FOLDERS, "--per-sample", "-o", name).code == 0
    table = parquet_file.read_table("s.parquet")
    assert np.array_equal(table["score"].to_numpy(), np.load("s.npy"))
    assert sorted(path.name for path in Path().iterdir() if "part" in path.name) == []


def shard(name: str, array: np.ndarray) -> Callable[[], object]:
    return lambda: np.save(name, array)


def unlink() -> None:
    Path("t/1.npy").unlink()
    Path("t/1.npy").symlink_to("gone.npy")


SPOILED: dict[str, tuple[Callable[[], object], str]] = {
    "one went": (
        lambda: Path("t/1.npy").unlink(),
        "the shard p/1.npy has no partner t/1.npy; shards are matched by name",
    ),
    "one more": (shard("t/9.npy", ROWS), "the shard t/9.npy has no partner p/9.npy"),
    "another dtype": (
        shard("t/1.npy", np.zeros((5, 2))),
        "t/1.npy is float64, but t/0.npy is float32; convert the shards to one dtype",
    ),
    "another width": (
        shard("t/1.npy", np.zeros((5, 1), np.float32)),
        "t/1.npy has rows of shape (1,), but t/0.npy of (2,); score them apart",
    ),
    "fewer rows": (
        shard("t/1.npy", np.zeros((4, 2), np.float32)),
        "the shard 1.npy has input (5, 2), target (4, 2); row by row, they need the same number",
    ),
    "damage": (lambda: os.truncate("t/1.npy", 160), "t/1.npy is truncated or damaged"),
    "integers": (
        lambda: [np.save(f"{name}/0.npy", np.zeros((5, 2), np.int64)) for name in "pt"],
        "the shard 0.npy holds int64 and int64; a loss needs floating-point numbers",
    ),
    "a broken link": (unlink, "gone.npy, which does not exist; restore that, or remove"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_shards_that_do_not_fit_are_named(cli: Cli, folders: None, what: str) -> None:
    spoil, message = SPOILED[what]
    spoil()
    done = cli("score", *FOLDERS)
    assert done.code == 2 and message in done.err


def test_a_folder_without_shards_is_refused(cli: Cli) -> None:
    for name in ("p", "t"):
        Path(name).mkdir()
    assert "error: p holds no file of .npy, .npz, .parquet" in cli("score", *FOLDERS).err


def test_an_address_is_told_from_a_missing_file(cli: Cli) -> None:
    done = cli("score", "--input", "s3://bucket/p.parquet", "--target", "t.parquet")
    assert done.code == 2
    assert "is an address, and score reads files; copy what is there to this machine" in done.err


def test_nan_written_as_the_refusal_of_nulls_says_is_read() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet("a.parquet", input=pyarrow.array(np.array([1.0, np.nan])))
    assert np.isnan(open_source(Location(Path("a.parquet"), "input")).read(1, 2)).all()
