"""The images application without its cluster: folders of images, good and bad, and how rows are divided."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from expertmesh import ConfigError
from expertmesh.cluster.applications.result import Job
from expertmesh.examples.data.image_files import as_images, read_folder, read_image
from expertmesh.examples.images import Glance, Network, read, varied

SIDE = 16


def folder_of(path: Path, colours: dict[str, str], count: int = 6, size: tuple[int, int] = (20, 12)) -> Path:
    for name, colour in colours.items():
        (path / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", size, colour).save(path / name / f"{number}.png")
    return path


def test_a_folder_of_classes_is_read_as_squares_of_one_size(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "pictures", {"red": "red", "blue": "blue"})
    Image.new("RGB", (300, 7), "blue").save(path / "blue" / "wide.jpg")
    (path / "blue" / ".hidden").write_text("left out")
    x, y, names = read_folder(path, SIDE)
    assert names == ("blue", "red")
    assert x.shape == (13, 3, SIDE, SIDE)
    assert y.tolist() == [0] * 7 + [1] * 6
    assert bool((x[y == 1] == torch.tensor([1.0, 0.0, 0.0])[:, None, None]).all())


def test_an_image_is_cut_around_its_centre(tmp_path: Path) -> None:
    image = Image.new("RGB", (48, 16), "white")
    image.paste("black", (16, 0, 32, 16))
    image.save(tmp_path / "a.png")
    assert not bool(read_image(tmp_path / "a.png", SIDE).any())


def test_transparent_is_white_and_grey_has_one_channel(tmp_path: Path) -> None:
    Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    pixels = read_image(tmp_path / "clear.png", SIDE)
    assert bool((pixels == 255).all())
    assert as_images(pixels[None]).shape == (1, 1, SIDE, SIDE)


def broken(path: Path, kind: str) -> str:
    """A folder with a mistake; returns what the message must name."""
    if kind == "file":
        path.write_text("no folder")
        return "it is no folder"
    if kind == "empty":
        path.mkdir()
        return "0 subfolders"
    if kind == "one class":
        folder_of(path, {"red": "red"})
        return "at least two classes"
    folder_of(path, {"red": "red", "blue": "blue"}, count=4 if kind == "few" else 6)
    if kind == "few":
        return r"blue: the class has 4 images"
    target = path / "red" / "5.png"
    if kind == "text":
        target.write_text("not an image")
    elif kind == "cut off":
        noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(target)
        target.write_bytes(target.read_bytes()[:3000])
    elif kind == "16 bits":
        Image.new("I;16", (8, 8)).save(target)
        return r"red/5\.png has more than 8 bits"
    elif kind == "nested":
        (path / "red" / "more").mkdir()
        return "red/more: it is a folder inside the class 'red'"
    return r"red/5\.png cannot be read as an image"


@pytest.mark.parametrize("kind", ["file", "empty", "one class", "few", "text", "cut off", "16 bits", "nested"])
def test_a_folder_that_cannot_be_used_is_one_line_that_names_the_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "pictures"
    named = broken(path, kind)
    job = Job(seed=0, folder=tmp_path / "out", data=path, options={"side": str(SIDE)})
    with pytest.raises(ConfigError, match=named) as caught:
        read(job)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_option_that_is_no_size_is_refused(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "pictures", {"red": "red", "blue": "blue"})
    for side in ("4", "big", "-8", "1e9"):
        with pytest.raises(ConfigError, match="--set side"):
            read(Job(seed=0, folder=tmp_path, data=path, options={"side": side}))


def test_the_parts_are_of_every_class_and_another_seed_divides_otherwise() -> None:
    data = read(Job(seed=0, folder=Path("unused")))
    assert len(data.y) + len(data.later_y) + len(data.held_y) == 1797
    assert all(set(part.tolist()) == set(range(10)) for part in (data.y, data.later_y, data.held_y))
    assert not torch.equal(data.held_x, read(Job(seed=1, folder=Path("unused"))).held_x)


def test_a_varied_image_is_the_image_a_little_changed() -> None:
    x = torch.zeros(4, 1, SIDE, SIDE)
    x[:, :, 4:12, 4:12] = 1.0
    other = varied(x, seed=0, step=0)
    assert torch.equal(other, varied(x, seed=0, step=0))
    assert 0 < float((other - x).abs().mean()) < 0.1


def test_a_gate_that_is_aimed_prefers_an_expert_for_each_region() -> None:
    x = torch.zeros(40, 1, 8, 8)
    x[:20, :, :4], x[20:, :, 4:] = 1.0, 1.0
    scorer = Glance(1, 2)
    scorer.aim(x, seed=0)
    best = scorer(x).argmax(dim=1)
    assert len(set(best[:20].tolist())) == len(set(best[20:].tolist())) == 1
    assert best[0] != best[20]


def test_a_network_takes_any_side_that_can_be_pooled_twice() -> None:
    for side in (8, 9, 32):
        assert Network(3, side, 5, 2)(torch.zeros(2, 3, side, side)).shape == (2, 5)
