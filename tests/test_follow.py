"""A training and the evaluation that follows it, as two jobs."""

import json
import os
import signal
import subprocess
import sys

import pytest
import trainers

pytestmark = pytest.mark.usefixtures("kept_compilations")
STEPS = 12


def test_an_evaluation_beside_a_training_that_dies_sees_each_step_once_and_chooses_the_best(
    dataset_folder, model_folder, tmp_path
):
    run = tmp_path / "run"
    flags = trainers.config_flags(
        run, dataset_folder, model_folder, STEPS, stages="('sft',)", best_by="score"
    )
    trainer = trainers.start(flags)
    trainers.wait_for_step(trainer, run, "sft", 2)
    follower = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "sdpo_jax.evaluate",
            f"--workdir={run}",
            "--follow",
            "--split=val",
            "--decoder=score",
        ],
        cwd=trainers.ROOT,
        env=trainers.environment(devices=2),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    trainers.wait_for_step(trainer, run, "sft", 5)
    os.killpg(trainer.pid, signal.SIGKILL)
    trainer.communicate()
    told = trainers.end(trainers.start(flags))
    assert "waiting until all of its checkpoints are evaluated" in told

    seen = [line for line in trainers.end(follower).splitlines() if line.startswith("sft step")]
    done = [line.split(",")[0] for line in seen if ", score, val: " in line]
    assert len(done) == len(set(done))
    assert {"sft step 0", "sft step 6", f"sft step {STEPS}"} <= set(done)

    result = json.loads((run / "stages" / "sft.json").read_text())
    judged = {
        summary["step"]: summary["hit_ratio_at_1"]
        for summary in (json.loads(f.read_text()) for f in (run / "eval").glob("*.json"))
    }
    validated = [
        m["step"] for m in trainers.read_metrics(run / "metrics") if "validation/loss" in m
    ]
    assert judged[result["best_step"]] == max(judged[step] for step in validated)
