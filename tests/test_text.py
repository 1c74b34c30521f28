"""Text of people's files: its encoding, and one form of titles in every reader."""

import gzip
import json
import unicodedata

import pytest
from test_csv import write_csv

from sdpo_jax.data.prepared import read_dataset
from sdpo_jax.data.text import has_entity, latin_1, misread, plain, text_lines
from sdpo_jax.evaluation.metrics import recommended
from sdpo_jax.prepare import prepare
from sdpo_jax.system.errors import InputError


@pytest.mark.parametrize(
    ("title", "one_form"),
    [
        ("Amélie", "Amélie"),
        (unicodedata.normalize("NFD", "Été à Nîmes"), "Été à Nîmes"),
        ("\u212bngström", "Ångström"),  # the sign for the unit is the letter
        ("  two\u00a0 kinds\u3000of\tspace ", "two kinds of space"),
        ("zero\u200bwidth\ufeff", "zerowidth"),
        ("soft\u00adhyphen", "softhyphen"),
        ("Rise &amp; Shine", "Rise & Shine"),
        ("Kid&#39;s &#x201c;Tent&#x201D;", "Kid's “Tent”"),
        ("twice &amp;amp;quot;escaped&amp;amp;quot;", 'twice "escaped"'),
        ("AT&T, R&amp, Sense &not Sensibility", "AT&T, R&amp, Sense &not Sensibility"),
        ("&unknown; &; &#;", "&unknown; &; &#;"),
        ("&nbsp;T&uuml;rlen&nbsp;", "Türlen"),
    ],
)
def test_titles_that_look_the_same_are_the_same(title, one_form):
    assert plain(title) == one_form
    assert plain(one_form) == one_form


def test_entities_are_counted_where_one_is_resolved():
    titles = ["a &amp; b", "a & b", "&unknown;", "R&amp", "&#233;"]
    assert [has_entity(title) for title in titles] == [True, False, False, False, True]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("Señorita".encode(), "Señorita"),
        ("Señorita".encode("utf-8-sig"), "Señorita"),
        ("Señorita".encode("latin-1"), "Señorita"),
        ("L’été – “x”".encode("cp1252"), "L’été – “x”"),
        (b"\x81\xe9", "\x81é"),  # has no meaning on Windows either
        (b"", ""),
    ],
)
def test_bytes_are_utf8_or_else_latin_1(data, text):
    assert "".join(text_lines("my.csv", [data])) == text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_mark_of_utf_16_or_32_names_the_encoding(encoding):
    assert list(text_lines("my.csv", ["é\nü\n".encode(encoding)])) == ["é\n", "ü\n"]


def test_another_encoding_is_refused_after_a_line_of_latin_1_too():
    lines = ["é\n".encode("latin-1"), "Амели\n".encode("cp1251")]
    with pytest.raises(InputError, match=r"my.csv:2: found b'.*expected UTF-8 or Latin-1"):
        list(text_lines("my.csv", lines))


def test_the_first_line_that_is_not_utf8_is_told(caplog):
    lines = ["é\n".encode("utf-8-sig"), "é\n".encode("latin-1"), "ü\n".encode("latin-1")]
    assert list(text_lines("my.csv", lines)) == ["é\n", "é\n", "ü\n"]
    assert [record.getMessage() for record in caplog.records] == [
        "my.csv:2: read as Latin-1, as it is not UTF-8"
    ]


TITLES = ["Señorita Pérez", "Salt &amp; Pepper", "Über den Bergen", "Cafe\u0301", "A  B"]
PLAIN = ["Señorita Pérez", "Salt & Pepper", "Über den Bergen", "Café", "A B"]


def csv_of(folder, encode):
    rows = [f'{u},{i},"{title_of(i)}",{100 * u + n}' for u in range(12) for n, i in seen(u)]
    (folder / "my.csv").write_bytes(encode("\n".join(["user,item,title,timestamp", *rows, ""])))
    return "csv", folder / "my.csv"


def movielens_100k(folder, encode):
    lines = [f"{i + 1}|{title_of(i)} (1990)|01-Jan-1990||\n" for i in range(40)]
    (folder / "u.item").write_bytes(encode("".join(lines)))
    rows = [f"{u}\t{i + 1}\t5\t{100 * u + n}\n" for u in range(12) for n, i in seen(u)]
    (folder / "u.data").write_bytes(encode("".join(rows)))
    return "movielens", folder


def movielens_latest(folder, encode):
    lines = [f'{i},"{title_of(i)} (1990)",Drama\n' for i in range(40)]
    (folder / "movies.csv").write_bytes(encode("movieId,title,genres\n" + "".join(lines)))
    rows = [f"{u},{i},5.0,{100 * u + n}\n" for u in range(12) for n, i in seen(u)]
    (folder / "ratings.csv").write_bytes(encode("userId,movieId,rating,ts\n" + "".join(rows)))
    return "movielens", folder


def lastfm(folder, encode):
    names = "".join(f"{i}::{title_of(i)}\n" for i in range(40))
    (folder / "id2name.txt").write_bytes(encode(names))
    parts = {"train": range(8), "val": range(8, 10), "test": range(10, 12)}
    content = {split: [[i for _, i in seen(u)] for u in users] for split, users in parts.items()}
    (folder / "sequences.json").write_bytes(encode(json.dumps(content)))
    return "lastfm", folder


def goodreads(folder, encode):
    books = [
        json.dumps({"book_id": str(i), "title": title_of(i)}, ensure_ascii=False) for i in range(40)
    ]
    with gzip.open(folder / "goodreads_books_x.json.gz", "wb") as file:
        file.write(encode("\n".join(books)))
    rows = [
        {
            "user_id": f"u{u}",
            "book_id": str(i),
            "rating": 5,
            "read_at": "",
            "date_updated": f"Sun Jul {1 + u % 28:02d} 07:{n:02d}:10 -0700 2017",
        }
        for u in range(40)
        for n, i in enumerate(range(40))
        if (u + i) % 2
    ]
    with gzip.open(folder / "goodreads_interactions_x.json.gz", "wb") as file:
        file.write(encode("\n".join(map(json.dumps, rows))))
    return "goodreads", folder


def title_of(item):
    return TITLES[item] if item < len(TITLES) else f"Film {item}"


def seen(user):
    return [(n, (4 * user + n) % 40) for n in range(8)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
@pytest.mark.parametrize("source", [csv_of, movielens_100k, movielens_latest, lastfm, goodreads])
def test_every_reader_takes_both_encodings_and_gives_one_form(source, encoding, tmp_path):
    def encode(text):
        # Latin-1 has no mark to compose with.
        text = unicodedata.normalize("NFC", text) if encoding == "latin-1" else text
        return text.encode(encoding)

    dataset, path = source(tmp_path, encode)
    meta = prepare(dataset, str(path), str(tmp_path / "out"))
    titles = set(read_dataset(tmp_path / "out").titles.values())
    assert set(PLAIN) <= titles and not titles & (set(TITLES) - set(PLAIN))
    assert "HTML entities are resolved in 1 titles" in meta["notes"]


def test_titles_that_were_lost_in_another_encoding_are_told(tmp_path):
    file = write_csv(tmp_path / "my.csv")
    text = file.read_text().replace("Title, the 7th", "Les Misï¿½rables")
    file.write_text(text.replace("Title, the 8th", "Les Mis\ufffdrables"))
    told = prepare("csv", str(file), str(tmp_path / "out"))["notes"]
    assert "2 titles hold a character that was lost before, in another encoding" in told


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
@pytest.mark.parametrize("title", ["Album für die Jugend", "L’été", "Amélie – II", "阿甘正传"])
def test_titles_whose_utf8_was_read_as_latin_1_are_known(title, encoding):
    assert not misread(title)
    assert misread(title.encode().decode(encoding)) == title


def test_bytes_without_a_meaning_on_windows_are_known_too():
    assert misread(latin_1("my.csv", "Á".encode()) + " la carte") == "Á la carte"


@pytest.mark.parametrize("title", ["", "Heat", "Ça ira", "Nº 5", "Ärzte & Öl", "Señor ÿ"])
def test_titles_of_latin_1_are_what_they_are(title):
    assert not misread(title)


def test_titles_whose_utf8_was_read_as_latin_1_are_told(tmp_path):
    file = write_csv(tmp_path / "my.csv")
    text = file.read_text().replace("Title, the 7th", "AmÃ©lie")
    file.write_text(text.replace("Title, the 8th", "FÃ¼r immer"))
    told = prepare("csv", str(file), str(tmp_path / "out"))["notes"]
    assert any(
        note.startswith("2 titles seem to be UTF-8") and "'AmÃ©lie' for 'Amélie'" in note
        for note in told
    )


def test_titles_of_a_folder_written_by_hand_are_read_in_the_one_form(tmp_path):
    prepare("csv", str(write_csv(tmp_path / "my.csv")), str(tmp_path / "out"))
    items = tmp_path / "out" / "items.jsonl"
    items.write_text(items.read_text().replace("Title, the 3th", "A&amp;  Cafe\u0301"))
    assert read_dataset(tmp_path / "out").titles[3] == "A& Café"


def test_a_title_under_several_ids_and_forms_is_one_title_for_every_draw(tmp_path):
    """Composed, decomposed, and with an entity: none stands against another in a list."""
    kinds = [f"Été à Nîmes {n}" for n in range(8)]
    titles = [f"Film {n}" for n in range(24)] + kinds
    titles += [unicodedata.normalize("NFD", title) for title in kinds]
    titles += [title.replace("É", "&Eacute;").replace(" ", "  ") for title in kinds]
    rows = [
        f'u{u},i{i},"{titles[i]}",{1000 * u + n}'
        for u in range(60)
        for n, i in enumerate((7 * u + 8 * k + k // 3) % len(titles) for k in range(8))
    ]
    (tmp_path / "my.csv").write_text("\n".join(["user,item,title,timestamp", *rows, ""]))
    meta = prepare("csv", str(tmp_path / "my.csv"), str(tmp_path / "out"))
    data = read_dataset(tmp_path / "out")
    assert len(data.titles) == 48 and len({*data.titles.values()}) == 32
    again, windows = 0, [w for name in ("train", "val_all", "test_all") for w in data.splits[name]]
    for window in windows:
        named = [data.titles[item] for item in window.candidates]
        shown = {data.titles[item] for item in window.history}
        assert len({*named}) == 20
        assert not shown & {*named} - {data.titles[window.target]}
        again += data.titles[window.target] in shown
    told = f"in {again} of {len(windows)} windows the target has the same title as an item of the "
    assert again and any(note.startswith(told) for note in meta["notes"])


def test_an_answer_is_found_in_whatever_form_it_is_written():
    titles = ["Café", "A & B", "Heat"]
    for answer, found in (("Cafe\u0301!", 0), ("It is A  &amp; B.", 1), ("HEAT", None)):
        assert recommended(answer, titles) == found
