from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data.meta_obj import get_track_meta
from monai.data.meta_tensor import MetaTensor
from monai.transforms.spatial.array import Affine
from torch.nn.functional import interpolate

from medim.data.loading.augmentations import AUGMENTATIONS, GEOMETRIC, Augmentation, as_monai
from medim.data.preprocessing.steps import preprocess
from medim.types import Array, Step, UsageError, Volume


def turned(spacing: tuple[float, float, float]) -> Array:
    out = np.diag([*spacing, 1.0])
    out[:3, :3] = out[:3, [1, 0, 2]] * [1, -1, 1]
    out[:3, 3] = (4.0, -2.5, 9.0)
    return out


class TestAsMonai:
    @pytest.mark.parametrize(
        "steps",
        [
            [{"op": "orthogonalise_affine"}, {"op": "ras"}, {"op": "resample", "spacing": (1.5, 1.0, 2.0)}],
            [{"op": "crop_foreground", "margin": 1}, {"op": "pad_to_multiple", "multiple": 8}],
            [{"op": "clip_percentiles"}, {"op": "normalise"}],
        ],
    )
    def test_a_monai_pipeline_gives_what_preprocess_gives(self, steps: list[Step]) -> None:
        array = np.random.default_rng(0).gamma(2.0, 100.0, size=(1, 12, 15, 9)).astype(np.float32)
        affine = turned((1.0, 1.2, 2.5))
        expected = preprocess(Volume(array, affine, affine, array.shape[1:]), steps)
        got = as_monai(steps)(MetaTensor(torch.from_numpy(array), affine=torch.from_numpy(affine), meta={"tag": 1}))
        np.testing.assert_array_equal(got.numpy(), expected.array)
        np.testing.assert_array_equal(got.affine.numpy(), expected.affine)
        assert got.meta["tag"] == 1

    def test_a_2d_affine_of_monai_is_kept_in_its_form(self) -> None:
        image = MetaTensor(torch.rand(1, 30, 20), affine=torch.diag(torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64)))
        got = as_monai([{"op": "resample", "spacing": (1.0, 1.0)}])(image)
        assert got.shape == (1, 16, 10)  # 14.5 spacings of 1 mm and half a one are two half-voxels: to the even number
        np.testing.assert_allclose(got.affine.numpy(), np.eye(3))

    def test_a_plain_tensor_has_voxels_of_one_millimetre(self) -> None:
        got = as_monai([{"op": "resample", "spacing": (2.0, 2.0, 2.0)}])(torch.rand(1, 9, 9, 9))
        assert got.shape == (1, 5, 5, 5)
        np.testing.assert_allclose(got.affine.numpy(), np.diag([2.0, 2.0, 2.0, 1.0]))

    def test_a_misspelt_step_is_refused_before_any_image(self) -> None:
        with pytest.raises(UsageError, match="Did you mean 'resample'"):
            as_monai([{"op": "resampel"}])


ALL: list[Step] = [{"op": name, "probability": 0.7} for name in AUGMENTATIONS]


class TestAugmentation:
    @pytest.mark.parametrize("shape", [(1, 28, 28), (1, 12, 14, 10)])
    def test_the_seed_alone_decides(self, shape: tuple[int, ...]) -> None:
        image = torch.rand(shape)
        first, second = (Augmentation(ALL, spatial_dims=len(shape) - 1) for _ in range(2))
        expected = [first(image, seed)[0] for seed in range(6)]
        torch.rand(3)
        np.random.default_rng().normal()
        for seed in reversed(range(6)):
            torch.testing.assert_close(second(image, seed)[0], expected[seed], rtol=0, atol=0)
        assert len({tuple(e.flatten().tolist()) for e in expected}) == 6

    def test_the_callers_image_and_monais_settings_are_left_alone(self) -> None:
        image = torch.rand(1, 16, 16)
        before = image.clone()
        out, _ = Augmentation(ALL, spatial_dims=2)(image, 1)
        torch.testing.assert_close(image, before, rtol=0, atol=0)
        assert type(out) is torch.Tensor
        assert get_track_meta()

    def test_a_mask_goes_along_with_its_image(self) -> None:
        mask = torch.zeros(1, 20, 22, 18, dtype=torch.uint8)
        mask[:, 4:11, 9:18, 3:9] = 1
        mask[:, 6:9, 11:15, 5:8] = 3
        steps: list[Step] = [
            {"op": "flip", "axis": 2, "probability": 1.0},
            {"op": "affine", "rotate": 20, "translate": 2, "probability": 1.0},
            {"op": "noise", "std": 0.01, "probability": 1.0},
        ]
        augment = Augmentation(steps, spatial_dims=3)
        for seed in range(5):
            image, moved = augment(mask.float(), seed, mask)
            assert set(moved.unique().tolist()) <= {0, 1, 3}
            agree = (image.round() == moved).float().mean()
            assert agree > 0.93
            assert (moved != mask).any()

    def test_intensity_leaves_masks_alone(self) -> None:
        steps: list[Step] = [{"op": name, "probability": 1.0} for name in AUGMENTATIONS if name not in GEOMETRIC]
        mask = torch.randint(0, 3, (1, 9, 9), dtype=torch.uint8)
        image, same = Augmentation(steps, spatial_dims=2)(mask.float(), 0, mask)
        assert same is mask
        assert not torch.equal(image, mask.float())

    def test_the_default_flip_is_left_right(self) -> None:
        step: Step = {"op": "flip", "probability": 1.0}
        flat, solid = torch.rand(1, 5, 6), torch.rand(1, 5, 6, 7)
        torch.testing.assert_close(Augmentation([step], spatial_dims=2)(flat, 0)[0], flat.flip(2))
        torch.testing.assert_close(Augmentation([step], spatial_dims=3)(solid, 0)[0], solid.flip(1))

    def test_a_bias_field_brightens_tissue_and_not_air(self) -> None:
        image = torch.full((1, 24, 24), -1.0)
        image[:, 8:16, 8:16] = 2.0
        step: Step = {"op": "bias_field", "strength": 0.5, "probability": 1.0}
        got = Augmentation([step], spatial_dims=2)(image, 3)[0]
        torch.testing.assert_close(got[:, :8], image[:, :8])
        assert (got[:, 8:16, 8:16] - 2).abs().max() > 0.05

    @pytest.mark.parametrize("padding", ["border", "reflection"])
    @pytest.mark.parametrize("shape", [(28, 36), (20, 28, 24)])
    def test_affine_is_monais(self, shape: tuple[int, ...], padding: str) -> None:
        dims = len(shape)
        coarse = torch.rand(1, 1, *(side // 4 for side in shape))
        image = interpolate(coarse, size=shape, mode="bilinear" if dims == 2 else "trilinear")[0]
        options = {"rotate": 25.0, "scale": 0.2, "translate": 3.0, "padding": padding, "probability": 1.0}
        transform = AUGMENTATIONS["affine"](spatial_dims=dims, **options)
        transform.set_random_state(5)
        got = transform(image)
        drawn: Any = transform
        angles = [float(angle) for angle in drawn._angles]
        oracle = Affine(
            rotate_params=angles if dims == 3 else angles[0],
            scale_params=[float(1 + zoom) for zoom in drawn._zoom],
            translate_params=[float(shift) for shift in drawn._shift],
            padding_mode=padding,
            image_only=True,
        )
        torch.testing.assert_close(got, torch.as_tensor(oracle(image)), rtol=0, atol=1e-5)
        assert (got - image).abs().max() > 0.1

    def test_rotation_is_in_degrees_and_within_its_range(self) -> None:
        transform: Any = AUGMENTATIONS["affine"](spatial_dims=3, rotate=180.0, probability=1.0)
        transform.set_random_state(0)
        drawn = np.abs([(transform.randomize(), transform._angles)[1] for _ in range(50)])
        assert 3.0 < drawn.max() <= np.pi

    def test_a_scale_about_the_mean_changes_the_contrast_only(self) -> None:
        image = torch.rand(1, 8, 8)
        transform = AUGMENTATIONS["intensity_scale"](factor=0.4, about_mean=True, probability=1.0)
        transform.set_random_state(3)
        scales = []
        for _ in range(20):
            changed = torch.as_tensor(transform(image))
            torch.testing.assert_close(changed.mean(), image.mean())
            scales.append(float(changed.std() / image.std()))
        assert 0.6 <= min(scales) < 0.8
        assert 1.2 < max(scales) <= 1.4

    def test_no_augmentation_gives_the_image_itself(self) -> None:
        image = torch.rand(1, 4, 4)
        assert Augmentation([], spatial_dims=2)(image, 0)[0] is image
