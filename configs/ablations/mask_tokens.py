"""Whether the encoder sees mask tokens (He et al. 2021, Table 1c: without is better, at under a third of the FLOPs).

python main.py --config=configs/ablations/mask_tokens.py[:BASE]"""

from configs.ablations import base as bases

ROWS = {"without": {"model.encoder_mask_tokens": False}, "with mask tokens": {"model.encoder_mask_tokens": True}}
PAPER = bases.curves(tuple(ROWS), (84.9, 84.2), (73.5, 59.6))


def get_config(base: str = "digits"):
    return bases.vary(bases.begin(base), ROWS, "mask tokens in the encoder", PAPER, "Table 1c")
