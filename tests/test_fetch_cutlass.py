"""The CUTLASS headers: fetched, checked against their pin, unpacked."""

from __future__ import annotations

import zipfile

import fetch_cutlass
import pytest


@pytest.fixture
def cutlass_wheel(tmp_path):
    """A small wheel in the shape of nvidia-cutlass, and its pin."""
    wheel = tmp_path / "nvidia_cutlass-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("cutlass_library/source/include/cute/tensor.hpp", "// tensor\n")
        archive.writestr("cutlass_library/manifest.py", "")
    digest = fetch_cutlass.hashlib.sha256(wheel.read_bytes()).hexdigest()
    return wheel, fetch_cutlass.Pin("nvidia-cutlass==1.0", digest)


def test_cutlass_unpacks_the_include_folder_alone(tmp_path, cutlass_wheel):
    wheel, pin = cutlass_wheel
    target = tmp_path / "third_party" / "cutlass"
    include = fetch_cutlass.fetch(target, pin, wheel)
    assert include == target / "include"
    assert (include / "cute/tensor.hpp").read_text() == "// tensor\n"
    assert not list(target.rglob("manifest.py"))
    # What is there already is not downloaded again: the name of this pin exists nowhere.
    assert fetch_cutlass.fetch(target, pin) == include


def test_cutlass_refuses_a_damaged_wheel_and_keeps_what_was_there(tmp_path, cutlass_wheel):
    wheel, pin = cutlass_wheel
    target = tmp_path / "third_party" / "cutlass"
    fetch_cutlass.fetch(target, pin, wheel)
    with open(wheel, "ab") as file:
        file.write(b"x")
    with pytest.raises(fetch_cutlass.FetchError, match=f"pins {pin.sha256}"):
        fetch_cutlass.fetch(target, pin, wheel)
    assert (target / "include/cute/tensor.hpp").is_file()


def test_a_changed_pin_makes_the_old_headers_stale(tmp_path, cutlass_wheel):
    wheel, pin = cutlass_wheel
    fetch_cutlass.fetch(tmp_path / "cutlass", pin, wheel)
    assert fetch_cutlass.is_current(tmp_path / "cutlass", pin)
    assert not fetch_cutlass.is_current(
        tmp_path / "cutlass", fetch_cutlass.Pin(pin.requirement, "0" * 64)
    )


def test_the_pin_file_is_complete(tmp_path):
    assert fetch_cutlass.read_pin().requirement == "nvidia-cutlass==4.2.0.0"
    broken = tmp_path / "cutlass.txt"
    broken.write_text("nvidia-cutlass==4.2.0.0\n")
    with pytest.raises(fetch_cutlass.FetchError, match="sha256"):
        fetch_cutlass.read_pin(broken)
