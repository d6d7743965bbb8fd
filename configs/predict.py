"""What a classifier says of pictures: predictions.csv, and predictions.png with the wrong and the least sure ones.

python main.py --config=configs/predict.py --config.init_from=runs/tuned [--config.data.path=PICTURE_OR_FOLDER]"""

from configs import common


def get_config():
    return common.of_checkpoint("predict")
