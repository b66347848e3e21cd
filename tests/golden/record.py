"""Records what the programs compute, to compare two states of the code after a change of its form.

    python tests/golden/record.py --output=before.json
    python tests/golden/record.py --output=after.json && diff before.json after.json

runs every program at its toy size, and each method on photos of the shared research data (skipped
where there are none), in a folder that is removed. Kept are the JSON results without times, places
and versions, and SHA-256 of the files that must not change. The figures belong to one machine: XLA
adds in another order on another processor. Steps that are in the output already are not run again.
Expected on two CPU cores: half an hour.
"""

import argparse
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

_VOLATILE = re.compile(
    r"seconds|time|date|commit|command|machine|version|provenance|path|workdir|output|_ms$|^ms"
    r"|_per_|speed|memory|cores|ours$|ratio|flops|peak_rss|work_outside|database|records$"
)


def _steps(shared: pathlib.Path, work: pathlib.Path) -> dict[str, tuple[list[str], list[str]]]:
    """Name -> (module and flags, glob patterns of files below the work folder to hash)."""
    lfw, out = shared / "data/lfw", lambda name: work / name
    ann = sorted(path for path in lfw.iterdir() if len(list(path.iterdir())) >= 5)[:3]
    photos = ",".join(str(sorted(path.iterdir())[0]) for path in ann)
    people = work / "people"
    toy = lambda name, *flags: [name, "--toy", *flags]  # noqa: E731
    return {
        "portrait": (["cloak", f"--output_dir={out('portrait')}"], ["portrait/*.png"]),
        "cloak": (
            toy("cloak", f"--images={photos}", f"--output_dir={out('cloak')}"),
            ["cloak/**/*.png"],
        ),
        "fawkes_shared": (
            ["cloak", f"--images={photos}", "--num_steps=20", f"--output_dir={out('fawkes')}"],
            ["fawkes/**/*.png", "fawkes/report.json"],
        ),
        "collect": (
            toy("collect", f"--data={people}", f"--output_dir={out('collect')}"),
            ["collect/*.csv"],
        ),
        "detect": (toy("detect", f"--output_dir={out('detect')}"), ["detect/faces.json"]),
        "detect_shared": (
            ["detect", f"--images={photos}", f"--output_dir={out('detect_shared')}"],
            ["detect_shared/faces.json"],
        ),
        "enroll": (toy("enroll", f"--gallery={people}", f"--database={out('database')}"), []),
        "match": (
            toy(
                "match",
                f"--queries={people}",
                f"--database={out('database')}",
                "--top_k=3",
                f"--workdir={out('match')}",
            ),
            ["match/matches.csv"],
        ),
        "identify": (
            toy(
                "identify",
                f"--data={work / 'everyone'}",
                "--min_photos=4",
                f"--workdir={out('identify')}",
            ),
            [],
        ),
        "verify": (
            toy(
                "verify",
                f"--pairs={shared / 'data/lfw_pairs.csv'}",
                f"--images={lfw}",
                f"--workdir={out('verify')}",
            ),
            ["verify/distances.csv"],
        ),
        "verify_pair": (["verify", f"--pair={photos.rsplit(',', 1)[0]}"], []),
        "train_extractor": (
            toy("train_extractor", f"--workdir={out('extractor')}"),
            ["extractor/extractor.safetensors"],
        ),
        "harden_extractor": (
            toy("harden_extractor", f"--workdir={out('hardened')}"),
            ["hardened/extractor.safetensors"],
        ),
        "attack_detector": (
            toy("attack_detector", f"--workdir={out('patch')}"),
            ["patch/patches/*.png"],
        ),
        "patch_shared": (
            [
                "attack_detector",
                f"--train={shared / 'data/video/head-pose-face-detection-female.gif'}",
                f"--test={shared / 'data/video/head-pose-face-detection-female.gif'}",
                "--train_frames=4",
                "--test_frames=6",
                "--epochs=8",
                "--scale_factors=0.709",
                f"--workdir={out('patch_shared')}",
            ],
            ["patch_shared/patches/*.png"],
        ),
        "patch_ablation": (toy("studies.patch_ablation", f"--workdir={out('ablation')}"), []),
        "make_unlearnable": (
            toy(
                "make_unlearnable",
                f"--data={people}",
                "--image_px=32",
                "--resize",
                f"--output_dir={out('unlearnable')}",
            ),
            ["unlearnable/images/**/*.png"],
        ),
        "unlearnable_shared": (
            [
                "make_unlearnable",
                f"--data={people}",
                "--granularity=class",
                "--image_px=32",
                "--resize",
                "--max_rounds=3",
                "--architecture=small_resnet",
                "--width=8",
                "--batch_size=16",
                f"--output_dir={out('unlearnable_class')}",
            ],
            ["unlearnable_class/images/**/*.png"],
        ),
        "train_victim": (
            toy(
                "train_victim",
                f"--data={out('unlearnable/images')}",
                f"--test_data={people}",
                "--image_px=32",
                "--resize",
                f"--workdir={out('victim')}",
            ),
            ["victim/curve.csv"],
        ),
        "unlearnable_study": (
            toy("studies.unlearnable_study", f"--workdir={out('study')}"),
            ["study/matrix.csv"],
        ),
        "unlearnable_faces": (toy("unlearnable_faces", f"--workdir={out('faces')}"), []),
        "fawkes_evaluation": (
            toy("fawkes_evaluation", f"--workdir={out('evaluation')}"),
            ["evaluation/table.csv"],
        ),
    }


def _stable(value, work):
    """Drops what differs between two runs of the same code."""
    if isinstance(value, dict):
        return {k: _stable(v, work) for k, v in value.items() if not _VOLATILE.search(k)}
    if isinstance(value, list):
        return [_stable(item, work) for item in value]
    return value.replace(str(work), "WORK") if isinstance(value, str) else value


def _copy_people(shared, people, num_singles=0):
    """Copies four photos of each of four people, and one each of others, in order of names."""
    found = sorted((shared / "data/lfw").iterdir())
    chosen = [(p, 4) for p in found if len(list(p.iterdir())) >= 5][:4]
    chosen += [(p, 1) for p in found if len(list(p.iterdir())) == 1][:num_singles]
    for person, count in chosen:
        (people / person.name).mkdir(parents=True)
        for photo in sorted(person.iterdir())[:count]:
            (people / person.name / photo.name).write_bytes(photo.read_bytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path.cwd())
    parser.add_argument("--only", default="", help="names of steps, separated by commas")
    options = parser.parse_args()
    root = options.root.resolve()
    shared = pathlib.Path(os.environ.get("AFR_SHARED") or root.parent / "shared").resolve()
    record = json.loads(options.output.read_text()) if options.output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        _copy_people(shared, work / "people")
        _copy_people(shared, work / "everyone", num_singles=4)
        for name, (command, patterns) in _steps(shared, work).items():
            if (options.only and name not in options.only.split(",")) or name in record:
                continue
            module, *flags = command
            done = subprocess.run(
                [sys.executable, "-m", f"experiments.{module}", *flags],
                cwd=root,
                capture_output=True,
                text=True,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )
            result = json.loads(done.stdout) if done.stdout else done.stderr[-600:]
            files = sorted(path for pattern in patterns for path in work.glob(pattern))
            record[name] = {
                "exit_code": done.returncode,
                "result": _stable(result, work),
                "files": {
                    str(path.relative_to(work)): (
                        _stable(json.loads(path.read_text())["images"], work)
                        if path.name == "report.json"
                        else hashlib.sha256(path.read_bytes()).hexdigest()
                    )
                    for path in files
                },
            }
            print(name, done.returncode, len(files), "files", file=sys.stderr, flush=True)
            options.output.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
