"""Entry module that gives transformers the classes of the installed library for `trust_remote_code=True`."""

from modeling_gkc.hub_entry import *  # noqa: F403
