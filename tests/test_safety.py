"""What comes from outside is never executed, and never names a path or a piece of markup."""

import ast
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import tiny_run
from damage import NAMES, tree
from test_prepare import write_movielens
from tiny import hf_folder

from sdpo_jax.convert import convert
from sdpo_jax.data.prepared import read_dataset
from sdpo_jax.data.readers.raw import read_files
from sdpo_jax.prepare import prepare
from sdpo_jax.report import report
from sdpo_jax.reports.markdown import fenced, plain
from sdpo_jax.reports.model_card import model_card
from sdpo_jax.runs.workdir import read_run
from sdpo_jax.system.errors import InputError

PACKAGE = Path(__file__).parents[1] / "sdpo_jax"
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch"}
# Calls that execute what they read, by their last two names.
EXECUTING = {
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "eval",
    "exec",
    "pd.read_pickle",
    "pandas.read_pickle",
}
FORBIDDEN = {"allow_pickle": True, "trust_remote_code": True, "shell": True}
HOSTILE = "<script>alert(1)</script> ![x](http://x) [a](http://x) | `b` *c* &lt; \x1b[31m\n# d"


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.name)
def test_no_module_unpickles_or_executes_what_it_reads(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not PICKLES & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in PICKLES
        elif isinstance(node, ast.Call):
            assert ".".join(ast.unparse(node.func).split(".")[-2:]) not in EXECUTING
            for keyword in node.keywords:
                if keyword.arg in FORBIDDEN and isinstance(keyword.value, ast.Constant):
                    assert keyword.value.value is not FORBIDDEN[keyword.arg]


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pth", "model.safetensors"])
def test_a_pickled_model_is_refused_unread(tmp_path, file):
    folder = hf_folder(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(pickle.dumps(Bomb(tmp_path / "pwned")))
    with pytest.raises(InputError, match=r"found (only \.bin|broken safetensors)"):
        convert(str(folder), str(tmp_path / "out"))
    index = {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"not a map of tensor names to \.safetensors"):
        convert(str(folder), str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "..", "", "a/b", 1, None])
def test_a_shard_outside_the_folder_is_refused(tmp_path, shard):
    folder = hf_folder(tmp_path / "hf")
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    index = {"weight_map": {"lm_head.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="not a map of tensor names"):
        convert(str(folder), str(tmp_path / "out"))


@pytest.mark.parametrize("folder", ["../", "/tmp/../", "../../../../../../../tmp/", "a/../../"])
def test_members_of_a_zip_are_written_nowhere(tmp_path, folder):
    raw = write_movielens(tmp_path / "ml")
    with zipfile.ZipFile(tmp_path / "ml.zip", "w") as archive:
        for file in ("u.data", "u.item"):
            archive.writestr(f"{folder}{file}", (raw / file).read_bytes())
    before = tree(tmp_path)
    files = read_files(tmp_path / "ml.zip", ("u.data", "u.item"), "MovieLens-100K")
    assert files["u.data"] == (raw / "u.data").read_bytes()
    assert tree(tmp_path) == before


def test_titles_ids_and_users_name_no_path(tmp_path):
    folder = write_movielens(tmp_path / "ml")
    hostile = [name.replace("\n", " ").encode("utf-8", "replace").decode() for name in NAMES]
    lines = (folder / "u.item").read_text(encoding="latin-1").splitlines()
    for number, name in enumerate(hostile[:-2]):
        lines[number] = f"{number + 1}|{name}|"
    (folder / "u.item").write_text("\n".join(lines), encoding="latin-1")
    prepare("movielens", str(folder), str(tmp_path / "out"))
    names = {"dataset.json", "items.jsonl", "sequences.jsonl"} | {
        f"{split}.jsonl" for split in ("train", "val", "test", "val_all", "test_all")
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ml", "out"]
    for file in (tmp_path / "out").glob("*s*.jsonl"):
        file.write_text(file.read_text().replace('"user": 19,', '"user": "../../x",'))
    assert read_dataset(tmp_path / "out").splits["test"][0].user == "../../x"


def test_text_from_files_is_no_markup_in_report_and_card(tmp_path):
    run = tiny_run.make_run(tmp_path / HOSTILE.replace("/", "").replace("\n", ""))
    file = run.parent / "data" / "dataset.json"
    meta = json.loads(file.read_text())
    file.write_text(
        json.dumps(meta | {"protocol": HOSTILE, "candidates": HOSTILE, "dataset": HOSTILE})
    )
    stored = json.loads((run / "config.json").read_text())
    stored["config"]["lora"]["init_from"] = HOSTILE
    (run / "config.json").write_text(json.dumps(stored))
    summary = {
        "stage": "sft",
        "step": 2,
        "decoder": "greedy",
        "rank": "candidates",
        "split": "test",
        "n": 4,
        "hit_ratio_at_1": 0.5,
        "protocol": HOSTILE,
    }
    (run / "eval").mkdir()
    (run / "eval" / "sft-2-greedy.json").write_text(json.dumps(summary))
    meta = json.loads(file.read_text())
    for text in (report(run), model_card(read_run(run), meta, "sft", 2, "peft")):
        assert "<script" not in text and "\x1b" not in text
        for mark in ("![x]", "[a](", " `b`", "*c* &lt"):
            assert mark not in text, mark
        assert not any(line.startswith("# d") for line in text.splitlines())
        table = [line for line in text.splitlines() if line.startswith("|")]
        assert {line.replace("\\|", "").count("|") for line in table} <= {3, 6, 8, 9}


def test_a_prompt_with_a_fence_stays_in_its_block():
    assert plain("a_b <c> | `d`\n# e") == r"a_b &lt;c> \| \`d\` # e"
    assert fenced("x\n````\n# y").split("\n") == ["`````", "x", "````", "# y", "`````"]
