"""Names of the code say what they hold, and mean one thing; see CONTRIBUTING.md, "Language"."""

import house


def test_no_name_of_the_glossary_s_left_column():
    assert not house.forbidden_names()


def test_no_top_level_name_stands_in_more_than_two_modules():
    assert not house.shared_names()


def test_no_sentence_of_docstrings_and_comments_is_over_thirty_words():
    assert not house.long_sentences()


def test_each_count_finds_what_it_counts(tmp_path):
    package = tmp_path / "mae"
    package.mkdir()
    words = " ".join(["word"] * 31)
    body = f'"""{words}."""\n\ndef load(given):\n    found: Any = given\n    return found\n'
    for name in ("a", "b", "c"):
        (package / f"{name}.py").write_text(body)
    assert [line.rsplit(" ", 1)[1] for line in house.forbidden_names(tmp_path)][:2] == ["given", "found"]
    assert house.shared_names(tmp_path) == ["load: mae/a.py, mae/b.py, mae/c.py"]
    assert len(house.long_sentences(tmp_path)) == 3 and house.anys(tmp_path) == 3
