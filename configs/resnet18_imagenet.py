r"""FLIQS search, ResNet-18 on ImageNet.

python -m fliqs_jax.main --workdir=$DIR --config.data.data_dir=$DATA \
    --config=configs/resnet18_imagenet.py:space=int_l,target=1.1

The paper's numbers, not yet measured by us: FLIQS-L at 32.33 GBOPs (target
1.1) 69.56 % top-1, FLIQS-S at 36.46 (1.25) 69.92 %; INT4 67.32, INT8 70.60,
BF16 71.17 (Figure 15). Floats: E4M3 71.69 (Table 7).

Arguments: see imagenet.py. The widths of Figures 15 and 21 are 0.5, 0.75, 1,
1.25, 1.5 and 2.

Values that the paper does not give: momentum 0.9 and weight decay 1e-4 are
those of He et al. 2015, random crop and flip those of Goyal et al. 2017.
"""

import ml_collections

from configs import imagenet


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the config; see imagenet.py for the arguments."""
  arg = imagenet.parse_arg(arg)
  return imagenet.residual_recipe(
    arg,
    model=dict(name='resnet18', width=arg.width),
    smoke_model=dict(name='resnet10', width=1 / 8),
    smoke_image_size=32,
    weight_decay=1e-4,
  )
