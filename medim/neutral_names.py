"""Neutral names of files and folders: they consist of known words and short numbers and identify nobody."""

from __future__ import annotations

import re
import unicodedata
from datetime import date
from functools import lru_cache
from itertools import permutations

MAX_DIGITS = 3  # of the numbers in a word, without leading zeros; an ID of a patient is longer
_WORDS = """
    and the of with without no not non for from in on to by as at is or all any other ii iii iv vi vii viii ix xi
    xii one two three four five six seven eight nine ten

    anon anonymous anonymized anonymised case cases cohort control controls deid ex example examples id ids
    participant participants pat patient patients person persons pt pts sub subj subject subjects sample samples
    volunteer volunteers phantom phantoms template templates group groups site sites center centre arm arms fold
    folds

    session sessions ses visit visits exam exams study studies series baseline bl followup follow fu up scan scans
    run runs rescan retest test tests testing train training val valid validation split splits ts tr timepoint tp
    day week month year hour pre post before after base first second third last early late repeat new old

    image images imagestr imagests imagesval img imgs im labels labelstr labelsts label mask masks seg segs
    segmentation segmentations gt truth groundtruth annotation annotations contour contours roi rois lesion lesions
    data dataset datasets raw file files folder folders dir volume volumes vol slice slices frame frames stack view
    views crop crops cropped patch patches input inputs output outputs out result results report reports table
    tables list metadata meta info readme license index store cache tmp temp work home root mnt media usr var opt
    srv srcs users public private shared share project projects research archive archives export exports import
    imports incoming upload uploads download downloads backup copy copies original originals orig converted
    conversion processed preprocessed preprocessing derivatives derivative sourcedata rawdata source sources target
    targets reference ref final draft part parts batch batches set sets subset misc various unknown unnamed untitled
    none null na todo done ok bad good damaged broken truncated empty size sizes format formats full small large
    short long thin thick half whole single multi double left right bilateral lr down low high mid middle top bottom
    upper lower inner outer bin version ver rev

    dicom dicoms dicomdir dcm dcms ima nii nifti niftis gz tar zip hdr nrrd mha mhd mgz mgh png jpg jpeg jpgs pngs
    tif tiff bmp gif npy npz csv tsv json txt xml html pdf bids mni mnist decathlon task nnunet cpu gpu pacs ris

    mr mri mra mrs mrcp fmri smri dmri qmri rmn irm ct cta cbct pet us xr xray xrays rx cr dx dr rf mg nm ot sc sr
    ko radiograph radiographs radiography radiology tomography modality modalities sequence sequences protocol
    protocols channel channels contrast contrasts echo echoes te ti fa tesla value values iso isotropic mm cm hz res
    resolution highres lowres hires matrix fov nex avg average mean median sum max min mip mpr mprs recon
    reconstruction reformat loc localizer localiser locator scout survey topogram calibration calib cal shim sense
    asset grappa smash caipi breath hold bh triggered trig gated gating navigator nav motion moco corrected corr
    correction uncorrected norm normalized normalised nonorm reg registered registration coreg resampled resliced
    resized scaled rescaled smoothed denoised stripped skullstripped bet biascorr bias defaced deface defacemask
    warped deformed cropvolume

    axial ax axi tra trans transverse transversal sag sagittal cor coronal obl oblique oblq ap pa lat lateral lao
    rao supine prone erect standing decubitus portable frontal anterior posterior superior inferior medial distal
    proximal dorsal ventral cranial caudal

    wi tw se tse fse ge gre fgre spgr flash mp mprage rage memprage space cube vista bravo vibe thrive lava fiesta
    ciss trufi truefisp fisp ssfp bssfp bffe ffe tfe haste ssfse propeller blade stir spir spair fs fatsat fat water
    dixon opp inphase outphase ip op tirm flair ir irse epi ep dwi dti dsi hardi noddi adc md ad rd trace tracew
    tensor bval bvec bvals bvecs asl pcasl pasl perf perfusion dsc dce cbf cbv mtt tmax ttp swi swan susc qsm phase
    magnitude mag real imag complex fieldmap fmap fieldmaps phasediff bold sbref rest resting func functional anat
    anatomical anatomy dyn dynamic cine tof angio angiography venography ce cemra gd gado gadolinium km inj pd pdw
    pdt unit star inplane mese megre mpm mtr mts irt tb map maps mt mtsat rms tgse dess medic merge hyper weighted
    weighting sos noise gain inverted picture pictures photo photos

    abdomen abdominal ankle aorta atrium atrial bladder bone bowel brain brains breast breasts cardiac cerebral
    cervical chest colon cspine elbow femur finger foot heart heads head hip hips hippocampus hippocampal hepatic
    vessel vessels kidney kidneys knee knees lsp lspine lumbar liver lung lungs neck orbit orbits pancreas
    pancreatic pelvis pelvic pituitary prostate rib ribs sacrum shoulder sinus skull spine spleen thorax thoracic
    thyroid tibia tspine uterus ventricle ventricles ventricular wrist la lv rv ra csf gm wm tumor tumour tumors
    tumours edema oedema enhancing necrotic core background foreground

    normal abnormal healthy sick disease diseases finding findings positive negative pos neg benign malignant cancer
    pneumonia bacteria bacterial virus viral covid tuberculosis effusion atelectasis cardiomegaly consolidation
    infiltration mass nodule nodules pneumothorax emphysema fibrosis hernia fracture fractures opacity enlarged
    glioma glioblastoma meningioma metastasis metastases hgg lgg stroke infarct ischemia hemorrhage haemorrhage
    bleed ms sclerosis dementia alzheimer alzheimers mci cn grade grades stage stages severe mild moderate class
    classes

    acq acquisition rec mod flip inv proc hemi den desc recording chunk preproc prep fmriprep brainmask probseg dseg
    aseg aparc ll overlays well diagnosis demographics clinical

    siemens philips toshiba canon hitachi bruker fuji agfa carestream konica medical healthcare systems scanner
    scanners vendor vendors manufacturer model skyra prisma trio avanto verio aera vida sola achieva ingenia intera
    signa optima discovery

    age ages years yrs sex male female men women adult adults child children pediatric paediatric inpatient
    outpatient emergency ward urban rural north south east west

    brats isles msd acdc oasis adni ixi nih kermany tcia medmnist pneumoniamnist breastmnist chestmnist organamnist
    organcmnist organsmnist retinamnist bloodmnist nodulemnist organmnist vesselmnist fracturemnist adrenalmnist
    synapsemnist pathmnist dermamnist octmnist tissuemnist colin icbm

    pretrain pretrained pretraining finetune finetuned classifier segmenter encoder encoders decoder dim simclr
    infomax scratch seed seeds config configs preset probe probes predict prediction predictions embed embedding
    embeddings features package packages eval evaluate evaluation cls hi fsl spm ants afni freesurfer dcmniix niix
    mricron medim
"""
NEUTRAL_WORDS = frozenset(_WORDS.split())
_RUN = re.compile(r"[^\W_]+")
_PIECE = re.compile(r"[0-9]+|[^\W\d_]+|\d+")
_CAMEL = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


@lru_cache(maxsize=1 << 16)
def is_neutral_name(name: str) -> bool:
    """Whether a name of a file or folder identifies nobody.

    A name is neutral if it contains no date and each of its words, with letters and digits taken apart, is in
    `NEUTRAL_WORDS`, a single Latin letter, or a number. The numbers in a word (between two separators) have at most
    three digits in total, leading zeros not counted.

    Examples:
        >>> [is_neutral_name(name) for name in ("sub-01_T1w.nii.gz", "imagesTr", "MR_0007")]
        [True, True, True]
        >>> [is_neutral_name(name) for name in ("Doe_John", "4711", "3-4-61")]
        [False, False, False]
    """
    text = unicodedata.normalize("NFKC", name)
    words = _RUN.findall(text)
    return all(_is_neutral_word(word) for word in words) and not _contains_date(words)


def list_identifying_words(text: str) -> list[str]:
    """List the words of a text that are not neutral.

    Examples:
        >>> list_identifying_words("Doe T1 scan")
        ['Doe']
    """
    return [word for word in _RUN.findall(unicodedata.normalize("NFKC", text)) if not _is_neutral_word(word)]


def _is_neutral_word(word: str) -> bool:
    """Whether a run of letters and digits consists of neutral pieces."""
    if word.casefold() in NEUTRAL_WORDS:
        return True
    pieces = _PIECE.findall(word)
    numbers = [piece.lstrip("0") for piece in pieces if piece[0].isdigit()]
    return (
        word.isascii()
        and sum(map(len, numbers)) <= MAX_DIGITS
        and all(_are_neutral_letters(piece) for piece in pieces if not piece[0].isdigit())
    )


def _are_neutral_letters(letters: str) -> bool:
    """Whether letters are one word, or several in camel case."""
    parts = [letters] if letters.casefold() in NEUTRAL_WORDS else _CAMEL.findall(letters)
    return all(len(part) == 1 or part.casefold() in NEUTRAL_WORDS for part in parts)


def _contains_date(words: list[str]) -> bool:
    """Whether three words in a row are day, month and year in some order."""
    return any(
        _is_date(order)
        for start in range(len(words) - 2)
        if all(word.isdecimal() and len(word) <= 4 for word in words[start : start + 3])
        for order in permutations(map(int, words[start : start + 3]))
    )


def _is_date(numbers: tuple[int, ...]) -> bool:
    """Whether (day, month, year) exist, the year with two digits or four."""
    day, month, year = numbers
    try:
        date(year if year > 99 else 2000 + year, month, day)
    except ValueError:
        return False
    return 10 <= year <= 99 or 1900 <= year <= 2099
