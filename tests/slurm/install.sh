#!/usr/bin/env bash
# Usage: install.sh DIR. Unpacks Debian's Slurm into DIR: nothing on the system is touched, no daemon is started.
set -euo pipefail
target=$(mkdir -p "$1" && cd "$1" && pwd)
[ ! -e "$target/.ready" ] || exit 0
cd "$target"
packages="slurmctld slurmd slurm-client slurm-wlm-basic-plugins libslurm38 libhwloc15 libmunge2 libjson-c5"
# shellcheck disable=SC2086 # a list of words
apt-get download -qq $packages 2>/dev/null || { apt-get update -qq && apt-get download -qq $packages; }
for package in ./*.deb; do dpkg -x "$package" .; done
rm ./*.deb
touch .ready
