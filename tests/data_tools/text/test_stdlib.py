from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from data_tools.shards.shard import ShardOptions, shard
from data_tools.text import stdlib
from data_tools.text.find import find_files
from data_tools.text.json_lines import Fields
from data_tools.text.sources import FileSource
from data_tools.text.stdlib import Text, cut_prompts, docstrings_of, write_stdlib
from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from tests.kit.datasets import tiny_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stdlib")
    write_stdlib(path, 0.05)
    return path


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def documents(corpus: Path) -> list[dict[str, str]]:
    """Whole documents: the pages of `stdlib.jsonl` joined in order."""
    joined: dict[str, dict[str, str]] = {}
    for page in rows(corpus / "stdlib.jsonl"):
        name = page["name"].partition("#")[0]
        whole = joined.setdefault(name, {**page, "name": name, "text": ""})
        assert whole["split"] == page["split"]
        whole["text"] += page["text"]
    return list(joined.values())


def squeezed(text: str) -> str:
    """Without indentation and blank lines: a copy at another depth is a copy."""
    return "\n".join(stripped for line in text.splitlines() if (stripped := line.strip()))


def test_the_three_domains_are_there_without_tests_and_packages(corpus: Path) -> None:
    texts = documents(corpus)
    names = {text["name"] for text in texts}
    assert {text["domain"] for text in texts} == {"code", "docstrings", "prose"}
    assert {"code/argparse.py", "docstrings/argparse.py", "code/asyncio/base_events.py", "prose/with"} <= names
    assert len(names) == len(texts)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"site-packages", "test", "tests", "__pycache__", "idle_test", "encodings"}
    assert "code/pydoc_data/topics.py" not in names
    code = next(text["text"] for text in texts if text["name"] == "code/argparse.py")
    assert code == Path(sys.modules["argparse"].__file__ or "").read_bytes().decode()
    assert all(text["text"].strip() for text in texts)


def test_pages_are_short_and_give_the_document_back(corpus: Path) -> None:
    pages = rows(corpus / "stdlib.jsonl")
    assert max(len(page["text"]) for page in pages) <= stdlib.DOCUMENT_CHARACTERS
    code = "".join(page["text"] for page in pages if page["name"].startswith("code/argparse.py#"))
    assert code == Path(sys.modules["argparse"].__file__ or "").read_bytes().decode()
    assert "code/argparse.py#7" in {page["name"] for page in pages}


def test_docstrings_are_held_out_with_their_module(corpus: Path) -> None:
    splits = {text["name"]: text["split"] for text in documents(corpus)}
    for name, split in splits.items():
        domain, _, module = name.partition("/")
        if domain == "docstrings":
            assert splits[f"code/{module}"] == split
    held = [name for name, split in splits.items() if split == "validation"]
    assert {name.partition("/")[0] for name in held} == {"code", "docstrings", "prose"}
    assert len(held) < 0.2 * len(splits)


def test_prompts_come_from_validation_documents_alone(corpus: Path) -> None:
    """No prompt occurs in anything that a model would be trained on."""
    texts = documents(corpus)
    train = squeezed("\0".join(text["text"] for text in texts if text["split"] == "train"))
    held = {text["name"]: text["text"] for text in texts if text["split"] == "validation"}
    seen: set[str] = set()
    for domain in ("code", "docstrings", "prose"):
        prompts = rows(corpus / "prompts" / f"{domain}.jsonl")
        assert 8 <= len(prompts) <= 32
        for row in prompts:
            prompt = row["prompt"]
            assert 400 <= len(prompt) <= 800
            assert squeezed(prompt) not in train
            source = held[row["name"].partition("@")[0]]
            at = source.index(prompt)
            assert at == 0 or source[at - 1] == "\n"
            assert source[at + len(prompt)].isspace()
            seen.add(row["name"])
    assert len(seen) == sum(len(rows(path)) for path in (corpus / "prompts").iterdir())


def test_shard_takes_the_split_from_the_documents(corpus: Path, tmp_path: Path) -> None:
    source = tmp_path / "few.jsonl"
    texts = [row for row in rows(corpus / "stdlib.jsonl") if len(row["text"]) < 3000]
    source.write_text("".join(json.dumps(row) + "\n" for row in texts))
    options = ShardOptions(tiny_tokenizer(), tmp_path / "data", split_by_field=True)
    shard(FileSource(find_files([str(source)]), Fields(split="split")), options)
    validation = tmp_path / "data/validation"
    storage, tokenizer = Records(open_storage(validation), read_manifest(validation)), Tokenizer(tiny_tokenizer())
    found = "".join(tokenizer.decode(storage.read(number).tokens) for number in range(len(storage)))
    assert found == "".join(row["text"] for row in texts if row["split"] == "validation")


def test_the_files_are_the_same_every_time(corpus: Path, tmp_path: Path) -> None:
    write_stdlib(tmp_path, 0.05)
    files = [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*.jsonl"))]
    assert len(files) == 4
    assert all((corpus / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


def test_docstrings_are_joined_in_source_order() -> None:
    source = '''"""Module."""
class A:
    """Class
       indented."""
    async def f(self):
        "Method."
def g():
    "Function."
def h():
    pass
'''
    assert docstrings_of(source) == "Module.\n\nClass\nindented.\n\nMethod.\n\nFunction."
    assert docstrings_of("x = 1") == ""
    assert docstrings_of("def broken(:") == ""


def test_every_document_gives_a_prompt_before_one_gives_two() -> None:
    line = "some words on a line that is not long\n"
    texts = [Text(f"code/{n}", "code", "validation", f"{n} {line}" * 200) for n in range(20)]
    prompts = cut_prompts(texts)
    assert len(prompts) == 32
    sources = [prompt.name.partition("@")[0] for prompt in prompts]
    assert len(set(sources[:20])) == 20
    assert max(sources.count(source) for source in sources) == 2
    assert cut_prompts([Text("a", "code", "validation", "short"), Text("b", "code", "validation", "x" * 5000)]) == []
    with pytest.raises(AssertionError):
        cut_prompts([Text("a", "code", "train", "x y " * 500)])


def test_a_python_without_sources_or_a_bad_fraction_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--validation-fraction is 1\.5"):
        write_stdlib(tmp_path, 1.5)
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="no standard library sources"):
        write_stdlib(tmp_path, 0.05)
