from pyro_kd.handlers import record_noise, replay_noise
from pyro_kd.samplers import register_sampler
