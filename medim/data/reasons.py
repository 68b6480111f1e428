"""Every code that an index, a store or a reader gives a file: why it is no image, or what is odd about one.

`docs/reference/rejections.md` says what to do about each, and names a test that shows it.
"""

from __future__ import annotations

REASONS = {
    # files
    "missing": "No file or folder lies where one is named.",
    "empty-file": "The file has no bytes.",
    "unreadable": "The file cannot be opened, or its header is damaged or ends early.",
    "truncated": "The file ends before the voxels that its header announces.",
    "undecodable": "The header is whole, but the pixels or their rescaling cannot be decoded.",
    "no-pixels": "A DICOM header without pixels.",
    "wrong-length": "The file holds more pixels than its header announces.",
    "too-large": "The header announces more than 8 GiB of voxels.",
    "changed": "The file is no longer what the index was made of.",
    "reader-missing": "The library that reads this format is not installed.",
    "worker-died": "The process that read the file was killed or crashed.",
    "preprocessing-failed": "A step of the preprocessing cannot be applied to the image.",
    # what is no image
    "not-an-image": "A file of no format that medim reads, or a DICOM object without an image.",
    "no-image": "A folder without a DICOM file.",
    "wrong-modality": "An image of another modality than the one asked for.",
    "wrong-dimensions": "An image with other axes than its modality or format has.",
    "colour": "A colour image.",
    "not-scalar": "Several numbers a voxel, or numbers that are not real.",
    "burned-in": "The header says that annotation is burned into the pixels.",
    "localizer": "A localizer, by its image type.",
    "screen-save": "A picture of a screen, by its image type.",
    "mosaic": "Slices laid out as a mosaic in one picture.",
    "bit-depth": "Pixels of a width that is not 8, 16 or 32 bits.",
    "several-volumes": "Several volumes or frames where one is expected.",
    "several-series": "A folder of several DICOM images where one is expected.",
    "no-such-item": "The file has no image of that name.",
    "unknown-layout": "An archive without the arrays of MedMNIST.",
    # voxels
    "empty-image": "An axis of length 0.",
    "constant": "Every voxel has the same value.",
    "not-finite": "Voxels are NaN or infinite.",
    # places
    "bad-geometry": "Spacing, orientation or position is not finite, zero, or contradicts itself.",
    "no-geometry": "The header does not say where the slices lie.",
    "mixed-orientation": "A series of slices that do not lie parallel, such as a scout in three planes.",
    "mixed-size": "A series of slices that differ in rows or columns.",
    "mixed-spacing": "A series of slices that differ in pixel spacing.",
    "odd-orientation": "A slice that lies askew of a good stack of the same series.",
    "odd-size": "A slice with other rows or columns than a good stack of the same series.",
    "odd-spacing": "A slice with another pixel spacing than a good stack of the same series.",
    "missing-slices": "Slices are missing: gaps are multiples of the smallest one.",
    "uneven-gaps": "Slices lie more than 0.1 mm, or a tenth of the gap, off an even stack.",
    "sheared": "Slices lie more than 0.1 mm sideways of one another, as with a tilted gantry.",
    "duplicate-position": "Slices share a place, and nothing in their headers tells them apart.",
    "duplicate": "A copy: the SOPInstanceUID, or the place in its series, and the pixels of a file before it.",
    "conflicting-duplicate": "The SOPInstanceUID of a file before it, but other pixels.",
    # labels
    "label-without-image": "A label without an image that can be read.",
    "label-not-listed": "A label that `dataset.json` does not list.",
    "label-off-grid": "The label does not lie on the voxels of its image.",
    "label-unreadable": "An image whose label cannot be read.",
    "derived-label": "A segmentation of a BIDS tree, which is no image.",
    "not-a-mask": "A mask with values that are no whole numbers from 0 to 255.",
    "unknown-class": "A mask with a value that has no class.",
    "no-mask": "An image without a mask was asked for one.",
    # networks
    "not-for-this-network": "An image that the network of a package cannot take.",
}

QUALITY = {
    "derived": "Computed from other images (DICOM ImageType DERIVED).",
    "secondary-capture": "Written by something else than the scanner (DICOM Secondary Capture).",
    "lossy": "Compressed with loss at some time.",
    "inverted": "Stored with low values bright (MONOCHROME1); read with high values bright.",
    "for-processing": "An X-ray as the detector gave it, before it was made for looking at.",
    "padded": "The header knows a padding value; such pixels are read as the lowest of the rest.",
    "overlay-left-out": "Graphics over the image are left out.",
    "detector-spacing": "An X-ray whose pixels are measured on the detector or film, not in the patient.",
    "no-spacing": "An X-ray of unknown pixel spacing: 1 mm is assumed.",
    "no-place": "A volume whose place and direction in the patient are unknown; its axes may be wrong.",
    "single-slice": "A volume of one slice.",
    "odd-slices-left-out": "A few slices of the series do not fit this stack, and are refused.",
    "frames-left-out": "Some frames of the multi-frame file are in no image.",
}
