#!/bin/sh
# Stands for ssh in tests: runs the command here, as if it had come in on 127.0.0.1.
shift
SSH_CONNECTION="10.9.9.9 50000 127.0.0.1 22" exec /bin/sh -c "$*"
