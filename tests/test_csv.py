"""A CSV file of one's own: its forms, its protocol, and the line of each error."""

import csv
import os
import re

import pytest

from sdpo_jax.data.prepared import read_dataset
from sdpo_jax.data.readers.csv_file import Form, read_csv
from sdpo_jax.prepare import prepare, report
from sdpo_jax.system.errors import InputError

HEADER = "user,item,title,timestamp,rating"


def write_csv(file, users=12, items=40, each=8):
    """User u has the items u, u + 1, … in this order; their first rating is a 2."""
    rows = [
        f'{u},i{u + n},"Title, the {u + n}th",{100 * u + n},{5 if n else 2}'
        for u in range(users)
        for n in range(each)
    ]
    rows += [f'other,i{item},"Title, the {item}th",0,1' for item in range(items)]
    file.write_text("\n".join([HEADER, *rows, ""]))
    return file


def test_a_csv_file_follows_the_protocol_of_movielens(tmp_path):
    source = str(write_csv(tmp_path / "my.csv"))
    meta = prepare("csv", source, str(tmp_path / "out"), domain="book")
    windows = {"train": 9 * 4, "val": 1, "test": 2, "val_all": 4, "test_all": 8}
    assert meta["counts"]["windows"] == windows and meta["counts"]["interactions"] == 12 * 7
    dataset = read_dataset(tmp_path / "out")
    first = dataset.splits["train"][0]
    assert dataset.domain == "book" and dataset.titles[first.target] == "Title, the 4th"
    assert (first.user, first.history, first.target) == ("0", (1, 2, 3), 4)
    lines = report(meta, "out").splitlines()
    assert not any("paper" in line for line in lines) and "84" in lines[1]
    assert "--config=configs/quickstart.py --config.sft.max_steps=0" in lines[-1]
    assert "validation_split" not in lines[-1]  # that of the config, val_all, is there
    with pytest.raises(InputError, match="found domain 'book', expected 'movie'"):
        prepare("csv", source, str(tmp_path / "out"))


def test_of_several_interactions_with_an_item_the_first_counts(tmp_path):
    """Else the target stands in its history, and no other candidate does."""
    once, file = write_csv(tmp_path / "once.csv"), tmp_path / "twice.csv"
    head, *rows = once.read_text().splitlines()
    later = [re.sub(r",(\d+),(\d)$", lambda m: f",{int(m[1]) + 9999},{m[2]}", row) for row in rows]
    file.write_text("\n".join([head, *rows, *rows, *later]))
    for source in (once, file):
        prepare("csv", str(source), str(tmp_path / source.stem))
    read = [read_dataset(tmp_path / name) for name in ("once", "twice")]
    assert read[0].splits == read[1].splits


def test_columns_may_be_in_any_order_quoted_and_with_a_byte_order_mark(tmp_path):
    (tmp_path / "my.csv").write_bytes(
        "\ufefftitle, timestamp,extra,user,item\r\n"
        '"Net, The",2001-09-09T01:46:40Z,x,"Ann ""A"", B",é\r\n'
        "\r\n"
        "Ran,2001-09-09 03:46:41+02:00,,名,7\r\n"
        '"Net, The",2001-09-09,x,名, é \r\n'.encode()
    )
    found = read_csv(tmp_path / "my.csv")
    assert found.titles == {0: "Net, The", 1: "Ran"}
    assert found.rating_X is None and found.time_X.tolist() == [1e9, 1e9 + 1, 999993600.0]
    assert [found.users[user] for user in found.user_X] == ['Ann "A", B', "名", "名"]
    assert [found.items[item] for item in found.item_X] == [0, 1, 0]
    assert found.attributes == {0: {"item": "é", "extra": "x"}, 1: {"item": "7"}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ":1: found 0 columns 'user' in []"),
        ("user:item:title:timestamp\n", ":1: found 0 columns 'user'"),
        ("user,item,title\n", ":1: found 0 columns 'timestamp'"),
        (f"{HEADER},user\n", ":1: found 2 columns 'user'"),
        (f"{HEADER},rating\n", ":1: found 2 columns 'rating'"),
        (f"{HEADER},genre,genre\n", ":1: found 2 columns 'genre', expected each column once"),
        (f"{HEADER}\na,b,c,1\n", ":2: found 4 fields, expected 5 as in the header"),
        (f"{HEADER}\na,b,Net, The,1,5\n", ":2: found 6 fields, expected 5 as in the header"),
        (f"{HEADER}\n,b,c,1,5\n", ":2: found an empty user"),
        (f"{HEADER}\na, ,c,1,5\n", ":2: found an empty item"),
        (f"{HEADER}\na,b,,1,5\n", ":2: found title ''"),
        (f'{HEADER}\na,b,"c\nd",1,5\n', ":3: found title 'c\\nd'"),
        (f"{HEADER}\na,b,c,1,good\n", ":2: found rating 'good', expected a number"),
        (f"{HEADER}\na,b,c,1,nan\n", ":2: found rating 'nan', expected a number"),
        (
            f'{HEADER}\na,b,c,1,"4,5"\n',
            ":2: found rating '4,5', expected a number with a point, as 4.5",
        ),
        (f"{HEADER}\na,b,c,1,\n", ":2: found rating '', expected a number"),
        (f"{HEADER}\na,b,c,inf,5\n", ":2: found timestamp 'inf', expected a number or ISO 8601"),
        (f"{HEADER}\na,b,c,1_580,5\n", ":2: found timestamp '1_580'"),
        (f"{HEADER}\na,b,c,1,5\na,d,e,2001-09-09,5\n", ":3: found timestamp '2001-09-09', ISO"),
        ("user,item,title,timestamp,Rating\n", ":1: found column 'Rating' but none named"),
        (f"{HEADER}\na,b,c,12/30/1999,5\n", ":2: found timestamp '12/30/1999'"),
        (f"{HEADER}\na,b,c,1,5\n\nz,b,d,1,5\n", ":4: found item 'b' with the title 'd', expected"),
        (
            f'{HEADER}\na,b,"c,1,5\n',
            ":2: found invalid CSV (unexpected end of data), expected a CSV row",
        ),
        (f"{HEADER}\na,b,{'c' * 200_000},1,5\n", ":2: found invalid CSV (field larger than"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, text, said):
    file = tmp_path / "my.csv"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(file, f"{file}{said}")


def refused(file, said):
    output = file.parent / "out"
    with pytest.raises(InputError) as error:
        prepare("csv", str(file), str(output))
    assert str(error.value).startswith(said), error.value
    assert not output.exists()


def test_what_is_no_file_or_has_too_little_is_named(tmp_path):
    file = tmp_path / "my.csv"
    refused(file, f"{file}: found No such file or directory, expected a CSV file")
    os.mkfifo(file)
    refused(file, f"{file}: found no regular file")
    refused(tmp_path, f"{tmp_path}: found Is a directory")
    file.unlink()
    file.write_text(f"{HEADER}\n")
    refused(file, f"{file}: found no users and items with 1 interactions among 0")
    write_csv(file, users=3, each=4)
    refused(file, f"{file}: found no window with 3 items of history in train")
    write_csv(file, items=10, each=6)
    refused(file, "items: found ")


def test_options_of_other_data_sets_are_refused(tmp_path):
    source, output = str(write_csv(tmp_path / "my.csv")), str(tmp_path / "out")
    for arguments, said in [
        (("csv", None, output), "--source: found nothing, expected a CSV file"),
        (("csv", source, output, "released"), "--candidates: found released"),
        (("movielens", None, output, "independent", 0, None, "book"), "--domain: found book"),
    ]:
        with pytest.raises(InputError, match=said):
            prepare(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["my.csv"]


def written(file, header, delimiter=",", quote='"', first=""):
    """The file of `write_csv` with another header and other characters between fields."""
    rows = list(csv.reader(write_csv(file).read_text().splitlines()))[1:]
    with open(file, "w", newline="") as out:
        out.write(first)
        quoting = csv.QUOTE_ALL if quote else csv.QUOTE_NONE
        writer = csv.writer(out, delimiter=delimiter, quotechar=quote or None, quoting=quoting)
        writer.writerows([header.split(","), *rows])
    return file


@pytest.mark.parametrize(
    ("header", "options", "delimiter", "quote", "first"),
    [
        (
            "reviewerID,asin,name,unixReviewTime,overall",
            (
                "user=reviewerID,item=asin,title=name,timestamp=unixReviewTime,rating=overall",
                None,
                None,
            ),
            ",",
            '"',
            "",
        ),
        (HEADER, (None, None, None), ";", '"', ""),
        (HEADER, (None, None, None), "\t", '"', ""),
        (HEADER, (None, None, None), "|", '"', "sep=|\r\n"),
        (HEADER, (None, "~", "'"), "~", "'", ""),
        (HEADER, (None, "tab", "none"), "\t", "", ""),
    ],
    ids=["other names", "semicolon", "tab", "sep=", "given", "unquoted"],
)
def test_columns_delimiter_and_quoting_are_found_or_given(
    header, options, delimiter, quote, first, tmp_path
):
    usual = read_csv(write_csv(tmp_path / "usual.csv"))
    found = read_csv(
        written(tmp_path / "my.csv", header, delimiter, quote, first), Form.of(*options)
    )
    assert found.titles == usual.titles and found.users == usual.users
    for name in ("user_X", "item_X", "rating_X", "time_X"):
        assert (getattr(found, name) == getattr(usual, name)).all()


@pytest.mark.parametrize(
    "name", ["overall", "Stars", "user_rating", "reviewRating", "ratings", "Score", "my rate"]
)
def test_a_column_that_seems_to_be_ratings_must_be_named_or_declined(tmp_path, name):
    file = written(tmp_path / "my.csv", f"user,item,title,timestamp,{name}")
    refused(file, f"{file}:1: found column {name!r} but none named rating")
    assert (read_csv(file, Form.of(f"rating={name}", None, None)).rating_X == 2).sum() == 12
    declined = read_csv(file, Form.of("rating=", None, None))
    assert declined.rating_X is None
    assert "no column of ratings is read: every row counts as liked" in declined.notes


@pytest.mark.parametrize("name", ["average_rating", "rating_count", "numRatings", "ratingDate"])
def test_what_many_people_rated_is_an_attribute_and_told(tmp_path, name):
    found = read_csv(written(tmp_path / "my.csv", f"user,item,title,timestamp,{name}"))
    assert f"columns kept as attributes of the items: {name}" in found.notes
    assert found.attributes[0] == {"item": "i0", name: "2"} and found.rating_X is None


@pytest.mark.parametrize(
    ("header", "options", "unread"),
    [
        ("user,item,title,timestamp,id", None, "id"),
        ("user,item,title,timestamp,", "rating=", "(no name)"),  # as of pandas' row numbers
        ("user,asin,name,timestamp,title", "item=asin,title=name", "title"),
        ("user,asin,title,timestamp,item", "item=asin", "item"),
    ],
)
def test_columns_that_are_not_read_are_told(tmp_path, header, options, unread):
    usual = read_csv(write_csv(tmp_path / "usual.csv"))
    file = written(tmp_path / "my.csv", header)
    found = read_csv(file, Form.of(options, None, None))
    assert f"columns not read: {unread}" in found.notes and found.rating_X is None
    assert found.titles == usual.titles and found.attributes == usual.attributes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("users=a", None, None),
            "--columns: found 'users=a', expected NAME=COLUMN with a NAME of",
        ),
        (("user", None, None), "--columns: found 'user', expected NAME=COLUMN"),
        (("rating", None, None), "--columns: found 'rating', expected NAME=COLUMN"),
        (("user=", None, None), "--columns: found 'user=', expected NAME=COLUMN"),
        ((None, "::", None), "--delimiter: found '::', expected a character or tab"),
        ((None, None, "''"), "--quote: found \"''\", expected a character or none"),
        ((None, None, None, "", "\\\\"), "--escape: found '\\\\\\\\', expected a character"),
    ],
)
def test_a_form_that_is_none_is_refused(options, said):
    with pytest.raises(InputError) as error:
        Form.of(*options)
    assert str(error.value).startswith(said)


def test_a_quote_that_does_not_end_leads_to_the_option(tmp_path):
    file = written(tmp_path / "my.csv", HEADER, "\t", "")
    file.write_text(file.read_text().replace("Title", '"Weird Title'))
    refused(file, f"{file}:3: found invalid CSV")
    with pytest.raises(InputError, match=r"or give --quote=none"):
        read_csv(file)
    assert read_csv(file, Form.of(None, None, "none")).titles[0] == '"Weird Title, the 0th'


@pytest.mark.parametrize("rounded", ["7.65612E+16", "1e+17", "9.78059E+12"])
def test_an_id_that_a_spreadsheet_rounded_is_refused(tmp_path, rounded):
    """Several ids become one."""
    file = write_csv(tmp_path / "my.csv")
    file.write_text(file.read_text().replace("\n1,", f"\n{rounded},"))
    refused(file, f"{file}:10: found user {rounded!r}, rounded as spreadsheets do, expected all")


def test_a_quote_after_a_backslash_leads_to_the_option(tmp_path):
    """As in Book-Crossing's files."""
    usual = written(tmp_path / "my.csv", HEADER, ";")
    title = 'A real "J. Peterman"; again'
    usual.write_text(usual.read_text().replace("Title, the 0th", title.replace('"', '\\"')))
    with pytest.raises(InputError, match=r"my.csv:2: found invalid CSV .* --escape='\\' where"):
        read_csv(usual)
    assert read_csv(usual, Form.of(None, None, None, "", "\\")).titles[0] == title


def test_the_form_of_a_csv_file_is_for_no_other_data_set(tmp_path):
    with pytest.raises(InputError, match=r"--columns, .*: found one for movielens, expected"):
        prepare("movielens", None, str(tmp_path / "out"), form=Form.of("user=x", None, None))
