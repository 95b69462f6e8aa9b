"""The build of flash_attn2._C: what setup.py does beyond setuptools, one concern per module."""
