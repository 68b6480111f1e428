"""Diagrams of docs/concepts/, one function per picture; `pictures.py` writes them."""

from __future__ import annotations

from collections.abc import Callable

from sketch import Sketch


def _mark_cells(kinds: dict[tuple[int, int], str]) -> Callable[[int, int], str]:
    return lambda row, column: kinds.get((row, column), "off")


def draw_encoder(sketch: Sketch, y: float, label: str, image: str | Callable[[int, int], str] = "input") -> None:
    """Draw an image of 8 x 8 cells at x = 20, followed by the encoder, up to x = 230."""
    sketch.grid(20, y, (8, 8), 10, image)
    sketch.text(60, y + 92, label)
    sketch.arrow((104, y + 40), (136, y + 40))
    sketch.box(140, y + 15, 80, 50, "encoder", "net")


def draw_infomax(title: str, words: str, own: str, other: str, *, whole: bool) -> Sketch:
    """Draw a critic that scores a summary with the map of its own image and with that of another image."""
    sketch = Sketch(720, 265, title, words)
    for y, label, kind in ((35, "image A", "yes"), (155, "image B", "no")):
        draw_encoder(sketch, y, label)
        sketch.arrow((224, y + 40), (256, y + 40))
        if whole:
            sketch.box(260, y, 80, 80, "map", kind)
        else:
            sketch.grid(260, y, (4, 4), 20, kind)
        sketch.arrow((344, y + 40), (506, 120 if kind == "yes" else 160))
    sketch.arrow((180, 48), (180, 17), (376, 17))
    sketch.grid(380, 10, (1, 6), 13, "feature")
    sketch.text(420, 37, "summary of A")
    sketch.arrow((462, 17), (550, 17), (550, 111))
    sketch.box(510, 115, 80, 50, "critic", "net")
    sketch.arrow((594, 127), (616, 117))
    sketch.arrow((594, 153), (616, 163))
    sketch.box(620, 80, 85, 50, own, "yes")
    sketch.box(620, 150, 85, 50, other, "no")
    return sketch


def local_dim() -> Sketch:
    """Draw DIM(L)."""
    words = "The summary of image A is scored with every location of map A, which should be high, and of map B, low."
    return draw_infomax(
        "Local Deep InfoMax", words, "each location\nscore up", "each location\nscore down", whole=False
    )


def global_dim() -> Sketch:
    """Draw DIM(G)."""
    words = "The summary of image A is scored once with the whole map of A, which should be high, and of B, low."
    return draw_infomax("Global Deep InfoMax", words, "one score\nup", "one score\ndown", whole=True)


def pairs() -> Sketch:
    """Draw the positive pairs, the negative pairs and the pairs in neither set."""
    sketch = Sketch(
        720,
        245,
        "The pairs of a batch",
        "Four images of four locations. Left: pairs of a summary with a location of its own image are positives, all "
        "others negatives. Right: the classes of one positive are itself and every location of the other images; the "
        "other locations of its own image are in neither set.",
    )
    sketch.text(190, 20, "all scores of a batch", head=True)
    sketch.text(530, 20, "the InfoNCE classes of one positive", head=True)

    def choose_kind(row: int, column: int) -> str:
        if row != 1 or column in (4, 6, 7):
            return "off"
        return "yes" if column == 5 else "no"

    sketch.grid(70, 55, (4, 16), 16, lambda row, column: "yes" if column // 4 == row else "no")
    sketch.grid(410, 55, (4, 16), 16, choose_kind)
    for x in (70, 410):
        for number, image in enumerate("ABCD"):
            sketch.text(x + 32 + 64 * number, 45, f"map {image}")
            sketch.text(x - 14, 63 + 16 * number, image)
    sketch.text(42, 138, "summary", left=True)
    for y, kind, words in (
        (160, "yes", "positive: a summary and a location of its own image"),
        (185, "no", "negative: a summary and a location of another image"),
        (210, "off", "in neither set: other locations of the same image"),
    ):
        sketch.grid(220, y, (1, 1), 16, kind)
        sketch.text(246, y + 8, words, left=True)
    return sketch


def prior_matching() -> Sketch:
    """Draw the discriminator of prior matching."""
    sketch = Sketch(720, 200, "Prior matching", "A discriminator distinguishes summaries from samples of a prior.")
    draw_encoder(sketch, 15, "image")
    sketch.arrow((224, 55), (256, 55))
    sketch.grid(260, 48, (1, 6), 13, "feature")
    sketch.text(300, 76, "summary, squashed\nto 0 ... 1")
    sketch.arrow((342, 55), (416, 55))
    sketch.grid(260, 138, (1, 6), 13, "input")
    sketch.text(300, 164, "uniform noise")
    sketch.arrow((342, 145), (380, 145), (416, 75))
    sketch.box(420, 35, 100, 60, "discriminator", "net")
    sketch.arrow((524, 50), (546, 50))
    sketch.arrow((524, 80), (546, 120))
    sketch.box(550, 15, 155, 60, "1. update discriminator\n(encoder fixed)", "no")
    sketch.box(550, 95, 155, 60, "2. update encoder\n(discriminator fixed)", "yes")
    return sketch


def occlusion() -> Sketch:
    """Draw the summary of an occluded image and the map of the whole image."""
    sketch = Sketch(
        720, 250, "Occlusion", "The summary comes from an image with a hidden block, the map from the whole image."
    )
    draw_encoder(sketch, 15, "a block hidden", lambda row, column: "hidden" if row < 5 and column > 2 else "input")
    draw_encoder(sketch, 135, "the whole image")
    sketch.arrow((224, 55), (286, 55))
    sketch.grid(290, 48, (1, 6), 13, "feature")
    sketch.text(330, 76, "summary")
    sketch.arrow((372, 55), (470, 55), (470, 96))
    sketch.arrow((224, 175), (286, 175))
    sketch.grid(290, 135, (4, 4), 20, "yes")
    sketch.text(330, 227, "map")
    sketch.arrow((374, 175), (470, 175), (470, 154))
    sketch.box(430, 100, 80, 50, "critic", "net")
    sketch.arrow((514, 125), (546, 125))
    sketch.box(550, 95, 155, 60, "includes locations\nhidden from the summary", "yes")
    return sketch


def coordinates() -> Sketch:
    """Draw the prediction of absolute and relative coordinates."""
    sketch = Sketch(
        720,
        235,
        "Coordinates",
        "Row and column are predicted from one local feature, the offset from two local features.",
    )
    for y, kinds, heading, loss in (
        (15, {(1, 2): "yes"}, "absolute", "row 2 of 4,\ncolumn 3 of 4"),
        (135, {(0, 3): "yes", (2, 1): "feature"}, "relative", "2 rows up,\n2 columns right"),
    ):
        sketch.text(60, y + 40, heading, head=True)
        sketch.grid(140, y, (4, 4), 20, _mark_cells(kinds))
        sketch.arrow((224, y + 40), (316, y + 40))
        sketch.box(320, y + 15, 120, 50, "small network", "net")
        sketch.arrow((444, y + 40), (536, y + 40))
        sketch.box(540, y + 10, 160, 60, loss, "loss")
    sketch.text(270, 42, "one place")
    sketch.text(270, 162, "two places")
    return sketch


def dense_dim() -> Sketch:
    """Draw the comparison of voxels of two views of the same region."""
    sketch = Sketch(
        720,
        250,
        "Dense Deep InfoMax",
        "Two views of the same region, one with hidden blocks, are compared voxel by voxel.",
    )
    draw_encoder(sketch, 15, "blocks hidden", lambda row, column: "hidden" if 2 <= row < 5 > column else "input")
    draw_encoder(sketch, 135, "the same region")
    for y in (15, 135):
        sketch.arrow((224, y + 40), (256, y + 40))
        sketch.box(260, y + 15, 80, 50, "decoder", "net")
        sketch.arrow((344, y + 40), (376, y + 40))
    sketch.grid(380, 15, (8, 8), 10, lambda row, column: "feature" if (row, column) == (3, 5) else "off")
    points = {(3, 5): "yes", (1, 1): "no", (6, 2): "no", (5, 6): "no", (0, 4): "no"}
    sketch.grid(380, 135, (8, 8), 10, lambda row, column: points.get((row, column), "off"))
    sketch.text(420, 107, "a voxel")
    sketch.text(420, 227, "sampled points")
    sketch.arrow((464, 50), (520, 100))
    sketch.arrow((464, 175), (520, 140))
    sketch.box(524, 95, 60, 50, "critic", "net")
    sketch.arrow((588, 120), (606, 120))
    sketch.box(610, 40, 100, 70, "same voxel\nscore up", "yes")
    sketch.box(610, 130, 100, 70, "other voxels\nscore down", "no")
    return sketch


def reconstruction() -> Sketch:
    """Draw the reconstruction of masked cubes."""
    sketch = Sketch(720, 125, "Reconstruction", "Encoder and decoder reconstruct the hidden cubes of an image.")
    cubes = {(0, 0), (0, 2), (1, 1), (1, 3), (2, 0), (2, 3), (3, 1), (3, 2)}
    draw_encoder(
        sketch, 15, "cubes hidden", lambda row, column: "hidden" if (row // 2, column // 2) in cubes else "input"
    )
    sketch.arrow((224, 55), (286, 55))
    sketch.box(290, 30, 80, 50, "decoder", "net")
    sketch.arrow((374, 55), (436, 55))
    sketch.grid(440, 15, (8, 8), 10, lambda row, column: "yes" if (row // 2, column // 2) in cubes else "off")
    sketch.text(480, 107, "reconstruction")
    sketch.arrow((524, 55), (556, 55))
    sketch.box(560, 25, 145, 60, "squared error\nin hidden cubes only", "loss")
    return sketch


def amdim() -> Sketch:
    """Draw the pairs of views and scales of AMDIM."""
    sketch = Sketch(
        720,
        250,
        "Augmented multiscale DIM",
        "The summary of each view is scored with finer maps of the other view, and coarse maps with coarse maps.",
    )
    for y, label in ((15, "view 1"), (135, "view 2")):
        draw_encoder(sketch, y, label)
        sketch.arrow((224, y + 40), (256, y + 40))
    sketch.grid(300, 45, (1, 1), 20, "feature")
    sketch.text(310, 85, "summary (1)")
    sketch.grid(400, 20, (5, 5), 14, "feature")
    sketch.text(435, 102, "coarse map (5)")
    sketch.grid(400, 140, (5, 5), 14, "yes")
    sketch.text(435, 222, "coarse map (5)")
    sketch.grid(270, 135, (7, 7), 11, "yes")
    sketch.text(308, 227, "fine map (7)")
    sketch.arrow((310, 95), (310, 131))
    sketch.arrow((324, 60), (396, 138))
    sketch.arrow((475, 60), (500, 60), (500, 175), (474, 175))
    sketch.box(540, 60, 165, 50, "1 → 7,  1 → 5,  5 → 5", "yes")
    sketch.box(540, 130, 165, 50, "the same from view 2\nto view 1", "yes")
    return sketch


def simclr() -> Sketch:
    """Draw the positive and negative pairs of SimCLR."""
    sketch = Sketch(
        720, 250, "SimCLR", "The projected summaries of two views of an image are near; those of other images are far."
    )
    for y, label, kind in ((15, "view 1 of A", "feature"), (135, "view 2 of A", "yes")):
        draw_encoder(sketch, y, label)
        sketch.arrow((224, y + 40), (246, y + 40))
        sketch.grid(250, y + 33, (1, 6), 13, "feature")
        sketch.arrow((332, y + 40), (356, y + 40))
        sketch.box(360, y + 15, 96, 50, "projection\n(discarded)", "net")
        sketch.arrow((460, y + 40), (480, y + 40))
        sketch.grid(484, y + 33, (1, 4), 13, kind)
    sketch.text(289, 76, "summary")
    sketch.grid(484, 100, (1, 4), 13, "no")
    sketch.grid(484, 120, (1, 4), 13, "no")
    sketch.text(410, 117, "other images,\nboth views")
    sketch.arrow((540, 55), (575, 55), (575, 175), (540, 175))
    sketch.arrow((510, 65), (510, 96))
    sketch.box(600, 40, 105, 70, "own other view\ncosine up", "yes")
    sketch.box(600, 130, 105, 70, "all others\ncosine down", "no")
    return sketch


def cpc() -> Sketch:
    """Draw the prediction of lower rows of patches from upper rows."""
    sketch = Sketch(
        720, 190, "Contrastive predictive coding", "From patches above, the features of patches below are predicted."
    )
    sketch.grid(20, 20, (7, 7), 18, lambda row, column: "input")
    sketch.text(83, 165, "overlapping patches")
    sketch.arrow((150, 83), (176, 83))
    sketch.box(180, 58, 80, 50, "encoder", "net")
    sketch.arrow((264, 83), (286, 83))

    def choose_kind(row: int, column: int) -> str:
        return "feature" if row < 3 else "off" if row == 3 else "yes" if column == 3 else "no"

    sketch.grid(290, 20, (7, 7), 18, choose_kind)
    sketch.text(353, 165, "1 feature per patch")
    sketch.arrow((420, 45), (456, 45))
    sketch.box(460, 20, 90, 50, "context\n(rows above)", "net")
    sketch.arrow((505, 74), (505, 120), (421, 120))
    sketch.text(505, 136, "predicts, k rows below")
    sketch.box(590, 20, 115, 50, "that patch\nscore up", "yes")
    sketch.box(590, 90, 115, 50, "other patches\nscore down", "no")
    return sketch


def vae() -> Sketch:
    """Draw encoder, sampling and decoder of a VAE."""
    sketch = Sketch(
        720,
        200,
        "Variational autoencoder",
        "An image is encoded as a normal distribution; a sample of it is decoded to an image.",
    )
    draw_encoder(sketch, 15, "image")
    sketch.arrow((224, 55), (251, 55))
    sketch.grid(255, 30, (1, 6), 13, "feature")
    sketch.grid(255, 66, (1, 6), 13, "feature")
    sketch.text(294, 20, "mean")
    sketch.text(294, 91, "spread")
    sketch.arrow((337, 55), (371, 55))
    sketch.text(410, 36, "sample")
    sketch.grid(375, 48, (1, 6), 13, "input")
    sketch.arrow((457, 55), (481, 55))
    sketch.box(485, 30, 80, 50, "decoder", "net")
    sketch.arrow((569, 55), (601, 55))
    sketch.grid(605, 15, (8, 8), 10, "yes")
    sketch.text(645, 107, "decoded image")
    sketch.arrow((294, 102), (294, 136))
    sketch.box(205, 140, 178, 45, "KL: close to the normal prior", "loss")
    sketch.arrow((645, 118), (645, 136))
    sketch.box(575, 140, 130, 45, "squared error", "loss")
    return sketch


def overlap() -> Sketch:
    """Draw entropies as lengths with the mutual information as their overlap."""
    sketch = Sketch(
        720, 190, "Entropy as length", "H(X) and H(Y) overlap by I(X; Y); their union has the length H(X, Y)."
    )
    sketch.box(60, 20, 380, 36, "H(X): the scan", "feature")
    sketch.box(280, 62, 380, 36, "H(Y): its summary", "input")
    sketch.box(280, 104, 160, 36, "I(X; Y): shared", "yes")
    sketch.box(60, 104, 214, 36, "H(X | Y): not in the summary", "off")
    sketch.box(446, 104, 214, 36, "H(Y | X): noise", "off")
    sketch.text(360, 165, "union: H(X, Y)")
    return sketch


SKETCHES = (
    *(overlap, pairs, local_dim, global_dim, prior_matching, occlusion, coordinates),
    *(dense_dim, reconstruction, amdim, simclr, cpc, vae),
)
