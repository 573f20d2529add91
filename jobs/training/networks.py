"""The networks of the presets for a GPU; without the command line's library, so that they can be measured alone."""

import dataclasses

from ddpm_core.config import UNetConfig

MISSION_64 = UNetConfig(model_channels=128, channel_mult=(1, 2, 2, 4), condition_channels=128)
MISSION_128 = dataclasses.replace(MISSION_64, channel_mult=(1, 1, 2, 2, 4), attn_resolutions=(128, 64, 32))
