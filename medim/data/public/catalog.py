"""Catalogue of public data sets for `medim fetch`: content, licence, and the publishers' checksums.

To add a data set, add one entry to `PUBLIC_SETS`; see docs/how-to/add-public-set.md. Checksums and addresses are copied
from publishers: MedMNIST's from `INFO` in medmnist 3.0.2, the Decathlon's from `DecathlonDataset` in MONAI 1.6.1. The
Cancer Imaging Archive sends checksums with its images (the NBIA Search REST API Guide on its wiki).
"""

from __future__ import annotations

from dataclasses import dataclass

from medim.types import Modality


@dataclass(frozen=True)
class PublicFile:
    """One file of a data set.

    Attributes:
        url: address of the file at the publisher.
        name: local file name; for an archive, the name of the extracted folder.
        md5: checksum from the publisher, or None.
        archive: whether the file is an archive to extract.

    Examples:
        >>> file = PublicFile("https://example.org/chest.npz?download=1", "chest.npz")
        >>> file.name, file.archive
        ('chest.npz', False)
    """

    url: str
    name: str
    md5: str | None = None
    archive: bool = False


@dataclass(frozen=True, kw_only=True)
class PublicSet:
    """A data set that anyone may download.

    Attributes:
        modality: modality of the images.
        title: description in one line.
        licence: short name of the licence.
        citation: citation requested by the authors.
        sums: origin of the checksums; None if there are none.
        files: files to download.
        collection: a collection of The Cancer Imaging Archive, instead of `files`.
        dicom: DICOM modalities to download from the collection.
        images: number of images, if published.
        size: bytes to download, if known.
        purpose: tasks that the labels allow.
        note: information for users of the set.

    Examples:
        >>> texts = {"title": "chest X-rays", "licence": "CC BY 4.0", "citation": "Doe et al. 2024"}
        >>> chest = PublicSet(modality="xray", **texts, sums=None, images=5856)
        >>> chest.images, chest.files
        (5856, ())
    """

    modality: Modality
    title: str
    licence: str
    citation: str
    sums: str | None
    files: tuple[PublicFile, ...] = ()
    collection: str | None = None
    dicom: tuple[str, ...] = ()
    images: int | None = None
    size: int | None = None
    purpose: str = "pretraining"
    note: str = ""


_MEDMNIST = "Yang et al. MedMNIST v2. Scientific Data 10, 41 (2023). https://doi.org/10.1038/s41597-022-01721-8"
_DECATHLON = "Antonelli et al. The Medical Segmentation Decathlon. Nature Communications 13, 4128 (2022). "
_DECATHLON += "https://doi.org/10.1038/s41467-022-30695-9"


def _build_pneumonia_set(stem: str, side: int, md5: str, size: int) -> PublicSet:
    return PublicSet(
        modality="xray",
        title=f"PneumoniaMNIST, chest X-rays of children, {side}x{side}, normal or pneumonia",
        licence="CC BY 4.0",
        citation=f"{_MEDMNIST}; Kermany et al. Cell 172(5) (2018). https://doi.org/10.1016/j.cell.2018.02.010",
        sums="medmnist 3.0.2",
        files=(PublicFile(f"https://zenodo.org/records/10519652/files/{stem}.npz?download=1", f"{stem}.npz", md5),),
        images=4708 + 524 + 624,
        size=size,
        purpose="classification, 2 classes",
    )


def _build_chest_set(stem: str, side: int, md5: str, size: int | None = None) -> PublicSet:
    return PublicSet(
        modality="xray",
        title=f"ChestMNIST, frontal chest X-rays of NIH ChestX-ray14, {side}x{side}, 14 findings",
        licence="CC BY 4.0",
        citation=f"{_MEDMNIST}; Wang et al. ChestX-ray8. CVPR (2017). https://doi.org/10.1109/CVPR.2017.369",
        sums="medmnist 3.0.2",
        files=(PublicFile(f"https://zenodo.org/records/10519652/files/{stem}.npz?download=1", f"{stem}.npz", md5),),
        images=78468 + 11219 + 22433,
        size=size,
        purpose="classification, 14 findings per image",
    )


def _build_decathlon_set(
    task: str, title: str, md5: str, *, images: int, classes: int, size: int | None = None
) -> PublicSet:
    return PublicSet(
        modality="mri",
        title=f"Medical Segmentation Decathlon, {task}: {title}",
        licence="CC BY-SA 4.0",
        citation=_DECATHLON,
        sums="MONAI 1.6.1",
        files=(PublicFile(f"https://msd-for-monai.s3-us-west-2.amazonaws.com/{task}.tar", task, md5, archive=True),),
        images=images,
        size=size,
        purpose=f"segmentation, {classes} {'class' if classes == 1 else 'classes'}",
    )


PUBLIC_SETS: dict[str, PublicSet] = {
    "pneumoniamnist": _build_pneumonia_set("pneumoniamnist", 28, "28209eda62fecd6e6a2d98b1501bb15f", 4_170_669),
    "pneumoniamnist_64": _build_pneumonia_set("pneumoniamnist_64", 64, "8f4eceb4ccffa70c672198ea285246c6", 20_606_998),
    "pneumoniamnist_128": _build_pneumonia_set(
        "pneumoniamnist_128", 128, "05b46931834c231683c68f40c47b2971", 75_506_212
    ),
    "pneumoniamnist_224": _build_pneumonia_set(
        "pneumoniamnist_224", 224, "d6a3c71de1b945ea11211b03746c1fe1", 214_384_716
    ),
    "chestmnist": _build_chest_set("chestmnist", 28, "02c8a6516a18b556561a56cbdd36c4a8"),
    "chestmnist_64": _build_chest_set("chestmnist_64", 64, "9de6cd0b934ebb5b7426cfba5efbae16", 401_604_127),
    "chestmnist_128": _build_chest_set("chestmnist_128", 128, "db107e5590b27930b62dbaf558aebee3"),
    "chestmnist_224": _build_chest_set("chestmnist_224", 224, "45bd33e6f06c3e8cdb481c74a89152aa", 3_889_293_042),
    "Task04_Hippocampus": _build_decathlon_set(
        "Task04_Hippocampus",
        "T1 crops, front and back of the hippocampus",
        "9d24dba78a72977dbd1d2e110310f31b",
        images=260 + 130,
        classes=2,
        size=28_400_000,
    ),
    "Task02_Heart": _build_decathlon_set(
        "Task02_Heart", "cardiac MRI, left atrium", "06ee59366e1e5124267b774dbd654057", images=20 + 10, classes=1
    ),
    "QIN-PROSTATE-Repeatability": PublicSet(
        modality="mri",
        title="QIN-PROSTATE-Repeatability, prostate MRI of 15 patients, each scanned twice, DICOM",
        licence="CC BY 4.0",
        citation="Fedorov et al. Data From QIN-PROSTATE-Repeatability. The Cancer Imaging Archive (2018). "
        "https://doi.org/10.7937/K9/TCIA.2018.MR1CKGND",
        sums="the archive, sent with the images",
        collection="QIN-PROSTATE-Repeatability",
        dicom=("MR",),
        purpose="pretraining, repeated scans",
    ),
    "COVID-19-AR": PublicSet(
        modality="xray",
        title="COVID-19-AR, chest X-rays of 105 patients who tested positive, DICOM (without its CT scans)",
        licence="CC BY 4.0",
        citation="Desai et al. Chest imaging representing a COVID-19 positive rural U.S. population. Scientific Data "
        "7, 414 (2020). https://doi.org/10.7937/tcia.2020.py71-5978",
        sums="the archive, sent with the images",
        collection="COVID-19-AR",
        dicom=("CR", "DX"),
    ),
}
