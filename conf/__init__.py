"""The settings of train and evaluate, for Hydra; installed as `minigpt.conf`."""
