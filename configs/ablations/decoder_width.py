"""The width of the decoder (He et al. 2021, Table 1b: 512 is best, narrower ones fine-tune nearly as well).

python main.py --config=configs/ablations/decoder_width.py[:BASE]"""

from configs.ablations import base as bases

TINY = (96, 192, 384, 768)  # 3 heads
WIDTHS = {"digits": (16, 32, 64, 128), "cifar10": TINY, "image_folder": TINY}
PAPERS = (128, 256, 512, 768, 1024)  # 16 heads
PAPER = bases.curves(PAPERS, (84.9, 84.8, 84.9, 84.4, 84.3), (69.1, 71.3, 73.5, 73.1, 73.1))


def get_config(base: str = "digits"):
    axis = ("model.decoder_width", WIDTHS.get(base, PAPERS))
    return bases.vary(bases.begin(base), axis, "width of the decoder", PAPER, "Table 1b")
