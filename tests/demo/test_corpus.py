"""Which text is read, in which order, and how it is split."""

import sysconfig

import pytest

from fastsae.demo import corpus
from fastsae.demo.corpus import read_corpus


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_a_folder_gives_its_text_files_in_order(tmp_path):
    write(
        tmp_path,
        {
            "b.txt": b"second " * 50,
            "a.md": b"first " * 50,
            "sub/c": "dritte Ü ".encode() * 50,
            ".hidden": b"hidden",
            ".git/config": b"hidden",
            "__pycache__/d.txt": b"machine",
            "latin1.txt": "Ü".encode("latin1") + b" more",
            "binary.bin": b"ab\0cd",
            "blank.txt": b"  \n",
        },
    )
    found = read_corpus(tmp_path)
    assert "".join(found.training + found.held_out) == "first " * 50 + "second " * 50 + "dritte Ü " * 50
    assert read_corpus(tmp_path) == found


def test_a_single_text_is_split_at_its_end(tmp_path):
    text = "".join(f"{i} " for i in range(2000))
    write(tmp_path, {"text.txt": text.encode()})
    found = read_corpus(tmp_path / "text.txt")
    assert "".join(found.training) + "".join(found.held_out) == text
    assert len("".join(found.held_out)) == len(text) // corpus.HELD_OUT_EVERY
    assert found.n_characters == len(text)


def test_of_many_documents_whole_ones_are_held_out(tmp_path):
    write(tmp_path, {f"{i:03}.txt": f"document {i}".encode() for i in range(60)})
    found = read_corpus(tmp_path)
    assert found.held_out == [f"document {i}" for i in (10, 30, 50)]
    assert len(found.training) == 57
    assert not set(found.training) & set(found.held_out)


def test_reading_ends_at_the_limit_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_BYTES", 101)
    write(tmp_path, {"a.txt": "Ü".encode() * 100, "b.txt": b"never read"})
    found = read_corpus(tmp_path)
    assert "".join(found.training + found.held_out) == "Ü" * 50


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--text .*nowhere does not exist"):
        read_corpus(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no text"):
        read_corpus(tmp_path)


def test_the_standard_library_is_its_own_sources_without_tests(tmp_path, monkeypatch):
    names = ("os.py", "encodings/cp037.py", "test/test_os.py", "site-packages/other/x.py", "json/decoder.py", "lib.so")
    write(tmp_path, {name: name.encode() * 20 for name in names})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path) if name == "stdlib" else None)
    found = read_corpus()
    assert "".join(found.training + found.held_out) == "os.py" * 20 + "json/decoder.py" * 20
    assert found.name.startswith("the standard library of Python 3.")
