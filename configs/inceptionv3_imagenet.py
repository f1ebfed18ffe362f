r"""FLIQS search, InceptionV3 on ImageNet.

python -m fliqs_jax.main --workdir=$DIR --config.data.data_dir=$DATA \
    --config=configs/inceptionv3_imagenet.py:space=int_l,target=1.23

The paper's numbers, not yet measured by us: FLIQS-L at 59.16 GBOPs (target
1.23) 75.67 % top-1, FLIQS-S at 52.02 (1.08) 75.07 % (Figure 18). Floats: E4M3
76.30 (Table 7).

Arguments: see imagenet.py. The widths of Figures 18 and 24 are 0.25, 0.5, 0.75,
1 and 1.5. Images have 224 pixels, because the paper's costs imply it; the
original has 299.

Values that the paper does not give: momentum 0.9 is our choice; weight decay
4e-5 and dropout 0.2 are those of TF-Slim's code, random crop and flip those of
Szegedy et al. 2015.
"""

import ml_collections

from configs import imagenet


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the config; see imagenet.py for the arguments."""
  arg = imagenet.parse_arg(arg)
  return imagenet.residual_recipe(
    arg,
    model=dict(
      name='inceptionv3',
      width=arg.width,
      modules=(3, 4, 2),
      norm_momentum=0.99,
      dropout=0.2,
    ),
    smoke_model=dict(width=1 / 16, modules=(1, 1, 1)),
    smoke_image_size=75,
    weight_decay=4e-5,
  )
