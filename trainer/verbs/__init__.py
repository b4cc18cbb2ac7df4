"""The commands, one file each, named as they are typed; nothing outside imports from here but `trainer.__main__`."""
