"""Slices of the volumes that nibabel ships for its own tests, with the facts that their headers state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from megatron_hgpt.demo.mini_sources import Picture, Source, package_file, resized, to_uint8

PLANES = ("sagittal", "coronal", "axial")
"""The plane perpendicular to canonical (RAS) axis 0, 1, 2."""


@dataclass(kw_only=True, slots=True)
class _Volume:
    file: str
    description: str
    evidence: str
    steps: dict[str, int]
    """Plane -> slices between two pictures; at least 3, so that no two pictures are adjacent within 2."""
    facts: dict[str, str]
    crop: bool = False
    """Crop to the box that holds signal."""
    licence: str = "MIT (nibabel)"
    min_signal: float = 0.25
    """Share of the slice's pixels that must exceed a tenth of the volume's 99.5th percentile."""


_VOLUMES = (
    _Volume(
        file="anatomical.nii",
        description="anatomical MRI of the brain, 33 x 41 x 25 voxels of 2 mm, normalised to a template",
        evidence="planes from the affine; header 'spm - 3D normalized'; used as the anatomical MRI in nibabel's tests",
        steps={"sagittal": 4, "coronal": 4, "axial": 4},
        facts={"modality": "MRI", "body_part": "brain", "purpose": "anatomical"},
    ),
    _Volume(
        file="functional.nii",
        description="functional MRI of the brain, 17 x 21 x 3 voxels of 4 x 4 x 8 mm, first of 20 volumes, normalised",
        evidence="planes from the affine; header 'spm - 3D normalized', 2 s per volume; nibabel's functional example",
        steps={"axial": 1},  # 8 mm apart
        facts={"modality": "MRI", "body_part": "brain", "purpose": "functional"},
    ),
    _Volume(
        file="example4d.nii.gz",
        description="MRI of the brain, 128 x 96 x 24 voxels, first of 2 volumes, cropped to the head",
        evidence="planes from the affine; dim_info names MRI's frequency, phase and slice axes",
        steps={"axial": 3},  # the other planes are strips of 24 voxels
        facts={"modality": "MRI", "body_part": "brain"},
        crop=True,
    ),
    _Volume(
        file="example4d+orig.HEAD",
        description="head time series in AFNI format, 33 x 41 x 25 voxels of 3 mm, first of 3 volumes",
        evidence="planes from the affine; TYPESTRING 3DIM_HEAD_ANAT, time axis of 3 s (TAXIS_FLOATS)",
        steps={"sagittal": 5, "coronal": 5, "axial": 4},
        facts={"body_part": "brain"},
    ),
    _Volume(
        file="scaled+tlrc.HEAD",
        description="brain volume in AFNI format in Talairach space, 47 x 54 x 43 voxels of 3 mm",
        evidence="planes from the affine; TYPESTRING 3DIM_HEAD_ANAT, TEMPLATE_SPACE TLRC",
        steps={"sagittal": 4, "coronal": 4, "axial": 4},
        facts={"body_part": "brain"},
    ),
    _Volume(
        file="phantom_EPI_asc_CLEAR_2_1.PAR",
        description="MRI of a phantom (Philips PAR/REC), 64 x 64 x 9, first of 3 volumes",
        licence="PDDL 1.0",
        evidence="PAR header: patient name 'phantom', technique FEEPI (gradient-echo EPI), slices tilted by 13 degrees",
        steps={"axial": 3},
        facts={"modality": "MRI", "body_part": "phantom", "sequence": "echo planar"},
        min_signal=0.05,
    ),
)


def _volume_pictures(volume: _Volume) -> list[Picture]:
    import nibabel

    source = Source(
        package="nibabel",
        file=f"tests/data/{volume.file}",
        licence=volume.licence,
        description=volume.description,
        evidence=volume.evidence,
    )
    loaded: Any = nibabel.load(package_file(source.package, source.file))
    values = np.asarray(loaded.dataobj, dtype=np.float32)
    values = values[..., 0] if values.ndim == 4 else values
    canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(values, loaded.affine))
    values = canonical.get_fdata(dtype=np.float32)  # [right, anterior, superior]
    spacing = np.array(canonical.header.get_zooms()[:3])
    low, high = np.percentile(values, (1, 99.5))
    signal = values > 0.1 * high
    if volume.crop:
        occupied = [np.flatnonzero(signal.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(2)]
        box = tuple(slice(max(index[0] - 2, 0), index[-1] + 3) for index in occupied)
        values, signal = values[box], signal[box]
    pictures = []
    for axis, plane in enumerate(PLANES):
        step = volume.steps.get(plane)
        for index in range(0, values.shape[axis], step) if step else ():
            if np.take(signal, index, axis).mean() < volume.min_signal:
                continue
            # image rows run from anterior or superior downwards
            pixels = to_uint8(np.flipud(np.take(values, index, axis).T), float(low), float(high))
            across, down = np.delete(spacing, axis)
            image = Image.fromarray(pixels)
            if abs(across / down - 1) > 0.02:  # square pixels
                image = image.resize((image.width, round(image.height * down / across)), Image.Resampling.BICUBIC)
            image, native = resized(image)
            pictures.append(
                Picture(
                    image=image,
                    source=source,
                    series=f"{volume.file.split('.')[0]}/{plane}",
                    position=index,
                    facts={**volume.facts, "plane": plane},
                    native=native,
                    region=f"{plane} slice {index} in RAS order",
                )
            )
    return pictures


def volume_pictures() -> list[Picture]:
    """Slices of nibabel's example volumes."""
    return [picture for volume in _VOLUMES for picture in _volume_pictures(volume)]
