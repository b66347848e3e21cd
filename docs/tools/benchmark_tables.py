"""Tables of speed, and the README's table of headline results."""

from collections.abc import Iterator
from typing import Any

from docs.tools import cloaking_tables, markdown, patch_tables
from docs.tools.markdown import number, percent, percents, spread, table

# What was measured on two machines, and on which: the files' endings.
_MACHINES = {"Intel Xeon": "", "AMD EPYC": "_epyc"}


def _on_machines(*names: str) -> tuple[str, ...]:
    """The files of results on both machines."""
    return tuple(f"{name}{ending}.json" for name in names for ending in _MACHINES.values())


def _by_machine(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each machine and its result."""
    for machine, ending in _MACHINES.items():
        yield machine, markdown.result(name + ending)


@table("benchmark_photos", *_on_machines("benchmark_detection", "benchmark_cloaking"))
def benchmark_photos() -> str:
    """Detection and cloaking beside public implementations."""
    names = {
        "benchmark_detection": ("ms a photo", "PyPI `mtcnn`"),
        "benchmark_cloaking": ("ms a face and step", "PyPI `fawkes`"),
    }
    lines = []
    for file, (unit, peer) in names.items():
        for machine, found in _by_machine(file):
            row = found["rows"][0]
            cells = (spread(row[key]) for key in ("ours", "peer", "ratio"))
            lines.append([f"{row['row']}, {unit}", peer, machine, *cells])
    head = ("", "beside", "processor", "ours", "theirs", "ratio")
    return markdown.render(head, lines, right=3)


@table("benchmark_folder", *_on_machines("benchmark_folder"))
def benchmark_folder() -> str:
    """Detection in a folder of photos of all sizes."""
    names = {"s, cold": "empty cache", "s, warm": "full cache"}
    lines = []
    for machine, found in _by_machine("benchmark_folder"):
        for row in found["rows"]:
            cells = (spread(row[key]) for key in ("ours", "peer", "ratio"))
            lines.append([f"{row['row']}, {names[row['quantity']]}", machine, *cells])
        yunet = spread(found["folder"]["yunet_seconds"])
        lines.append(["the same by YuNet, with decoding", machine, yunet, "", ""])
        for name in ("cold", "warm"):
            run = found["folder"][name]
            seconds, megabytes = markdown.short(run["compile_seconds"]), run["peak_bytes"] / 1e6
            what = f"{run['programs']} programs, {name}: seconds of compilation or loading; memory"
            lines.append([what, machine, f"{seconds}; {megabytes:.0f} MB", "", ""])
    head = ("seconds", "processor", "ours", "PyPI `mtcnn`", "ratio")
    return markdown.render(head, lines, right=3)


@table("benchmark_folder_cloaks", *_on_machines("benchmark_folder_cloaks"))
def benchmark_folder_cloaks() -> str:
    """Cloaks of a folder of photos of all sizes."""
    return _cold_and_warm("benchmark_folder_cloaks", "cloak")


@table("benchmark_group", *_on_machines("benchmark_group"))
def benchmark_group() -> str:
    """The cloak of a large photo with three large faces."""
    return _cold_and_warm("benchmark_group", "group")


def _cold_and_warm(name: str, runs: str) -> str:
    """What the cloaking program took with an empty cache and with a full one."""
    lines = []
    for machine, found in _by_machine(name):
        for row in found["rows"]:
            if not row["row"].startswith("cloak"):
                continue
            cache = row["quantity"].removeprefix("s, ")
            run = found["folder"][f"{runs}_{cache}"]
            lines.append(
                [
                    machine,
                    cache,
                    spread(row["ours"]),
                    str(run["programs"]),
                    markdown.short(run["compile_seconds"]),
                    f"{run['peak_bytes'] / 1e6:.0f} MB",
                ]
            )
    head = ("processor", "cache", "seconds", "programs", "seconds of compilation or loading")
    return markdown.render((*head, "memory"), lines, right=4)


@table("speed_changes", "speed_changes.json")
def speed_changes() -> str:
    """What was made faster, and what was tried and left."""
    lines = [
        [row["what"], markdown.short(row["before"]), markdown.short(row["after"]), row["kept"]]
        for row in markdown.result("speed_changes")["rows"]
    ]
    return markdown.render(("ms", "before", "after", "kept"), lines)


@table("benchmark_embedding", *_on_machines("benchmark_embedding"))
def benchmark_embedding() -> str:
    """Embedding aligned faces."""
    peers = {
        "dlib": ("dlib's ResNet", "dlib 20.0"),
        "facenet_casia": ("FaceNet, Inception-ResNet-v1", "facenet-pytorch's module"),
        "mobilefacenet": ("MobileFaceNet", "our torch version"),
    }
    lines = []
    for machine, found in _by_machine("benchmark_embedding"):
        for row in found["rows"]:
            name, peer = peers[row["row"].split(", ")[1]]
            peer = row["quantity"].partition(", ")[2] or peer
            cells = (spread(row[key]) for key in ("ours", "peer", "ratio"))
            lines.append([name, peer, machine, *cells])
    head = ("ms a face, batches of 16", "beside", "processor", "ours", "theirs", "ratio")
    return markdown.render(head, lines, right=3)


@table("benchmark_database", "benchmark_database.json")
def benchmark_database() -> str:
    """The reference database by size."""
    sizes: dict[str, dict[str, str]] = {}
    for row in markdown.result("benchmark_database")["rows"]:
        value = row["ours"]["median"] if isinstance(row["ours"], dict) else row["ours"]
        sizes.setdefault(row["row"].split()[1], {})[row["quantity"]] = value
    columns = {
        "enrolment, vectors per second": "enrolled, vectors/s",
        "upkeep and index, seconds": "upkeep and index, s",
        "query exact, in a group, ms": "exact query in groups of 256, ms",
        "query exact, one by one, ms": "exact query alone, ms",
        "query index, one by one, ms": "query through the index, ms",
        "recall@1 of the index": "recall@1 of the index",
    }
    known = {name for values in sizes.values() for name in values}
    lines = [
        [
            size,
            *(
                markdown.short(values[name]) if name in values else ""
                for name in columns
                if name in known
            ),
        ]
        for size, values in sizes.items()
    ]
    head = ("vectors", *(text for name, text in columns.items() if name in known))
    return markdown.render(head, lines, right=len(head))


@table("benchmark_database_large", "benchmark_database_large.json")
def benchmark_database_large() -> str:
    """What ten million vectors take, a line for each quantity."""
    lines = []
    for row in markdown.result("benchmark_database_large")["rows"]:
        value = row["ours"]["median"] if isinstance(row["ours"], dict) else row["ours"]
        lines.append([row["quantity"], markdown.short(value)])
    return markdown.render(("10,000,000 vectors of 128", "once"), lines, right=1)


@table("hot_loops", "hot_loops.json")
def hot_loops() -> str:
    """Each hot loop beside the device's limit."""
    loops: dict[str, dict] = {}
    for row in markdown.result("hot_loops")["rows"]:
        loops.setdefault(row["row"], {})[row["quantity"]] = row["ours"]
    device = loops.pop("the device")
    lines = []
    for name, figures in loops.items():
        (unit,) = (text.removeprefix("ms per ") for text in figures if text.startswith("ms per "))
        shares = ("share of the best product", "share of the best copy")
        lines.append(
            [
                f"{name}; per {unit}",
                *(spread(figures[f"{clock}ms per {unit}"]) for clock in ("processor ", "")),
                *(markdown.short(figures[f"{what} per {unit}"]) for what in ("MFLOP", "MB moved")),
                *(percent(figures[share]) for share in shares),
                str(figures["programs compiled"]),
                markdown.short(figures["seconds of compilation"]),
                markdown.short(figures["memory of the program, MB"]),
            ]
        )
    best = [markdown.short(device[name]) for name in sorted(device, reverse=True)]
    head = (
        *("", "processor ms", "ms", "MFLOP", "MB"),
        f"of {best[0]} GFLOP/s",
        f"of {best[1]} GB/s",
        *("programs", "compilation, s", "memory, MB"),
    )
    return markdown.render(head, lines, right=9)


@table("scaling", "scaling.json")
def scaling() -> str:
    """A cloak step over batches, a training step over devices."""
    rows: dict[str, list[str]] = {}
    for row in markdown.result("scaling")["rows"]:
        unit = row["quantity"].partition("ms ")[2]
        rows.setdefault(f"{row['row']}; {unit}", []).append(spread(row["ours"]))
    return markdown.render(("", "ms", "processor ms"), [[k, *v] for k, v in rows.items()], right=2)


@table(
    "headline",
    "protection_third_draw.json",
    "attack_persons.json",
    "unlearnable_cifar10.json",
    "lfw_pairs.json",
    *_on_machines("benchmark_detection", "benchmark_cloaking"),
    has_source_line=False,
)
def headline() -> str:
    """A line for each part of the project."""
    missed = cloaking_tables.unseen_at_mid()
    patches = [run["test"]["variants"] for run in patch_tables.runs_of_others()]
    noise = {row["data"]: row for row in markdown.result("unlearnable_cifar10")["rows"]}
    pairs = markdown.result("lfw_pairs")
    accuracies = [pairs[name]["accuracy"] for name in markdown.EXTRACTORS]
    ratios = [
        " / ".join(
            number(found["rows"][0]["ratio"]["median"], digits=1) for _, found in _by_machine(name)
        )
        for name in ("benchmark_detection", "benchmark_cloaking")
    ]
    lines = [
        [
            "the default cloak: clean probes missed by a tracker with five cloaked photos, whose "
            "network had no part (47 people, drawn last; the nearest neighbor)",
            f"{percents(*sorted(missed))} %, by tracker",
            "0 %",
        ],
        [
            "cheek patches: frames in which MTCNN misses the face, of two people on whom nothing "
            "was chosen",
            f"{percents(*(each['trained']['mean'] for each in patches))} %",
            f"0 %; plain black {percents(*(each['black']['mean'] for each in patches))} %",
        ],
        [
            "unlearnable noise of 8/255, CIFAR-10, ResNet-18: accuracy on clean test images",
            f"{percent(noise['error_min sample']['last_accuracy'], digits=1)} by sample, "
            f"{percent(noise['error_min class']['last_accuracy'], digits=1)} by class",
            percent(noise["clean"]["last_accuracy"], digits=1),
        ],
        [
            "recognition: accuracy on 3,000 LFW pairs, by extractor",
            f"{' / '.join(number(100 * value, digits=1) for value in sorted(accuracies))} %",
            f"dlib itself {percent(pairs['dlib_itself']['accuracy'], digits=1)}",
        ],
        [
            "speed on two CPU cores, Intel / AMD: detection; a step of a cloak (Intel: before the "
            "last changes)",
            f"{'; '.join(ratios)} times",
            "PyPI `mtcnn`; PyPI `fawkes`",
        ],
    ]
    return markdown.render(("what was measured", "result", "without, or beside"), lines)
