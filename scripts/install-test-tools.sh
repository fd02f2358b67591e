#!/usr/bin/env bash
# scripts/install-test-tools.sh - what some tests need beside Python: an OpenSSH server, started by
# the tests themselves on the loopback interface. Without it they skip, saying so. CI runs this; on
# a machine of your own, run it if you want those tests there.
set -u
[ -x /usr/sbin/sshd ] || command -v sshd >/dev/null || {
    root=""
    [ "$(id -u)" = 0 ] || root="sudo -n"
    export DEBIAN_FRONTEND=noninteractive
    command -v apt-get >/dev/null || { echo "no apt: tests over SSH will skip" >&2; exit 0; }
    echo "installing openssh-server (for tests over SSH)" >&2
    # Installed, never started: a server of the machine's own is not what the tests want.
    policy=/usr/sbin/policy-rc.d
    made=""
    [ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' | $root tee "$policy" >/dev/null 2>&1 &&
        $root chmod +x "$policy" && made=$policy; }
    $root apt-get install -y -qq --no-install-recommends openssh-server >/dev/null 2>&1 ||
        { $root apt-get update -qq && $root apt-get install -y -qq --no-install-recommends \
            openssh-server; } >/dev/null 2>&1 ||
        echo "cannot install openssh-server: tests over SSH will skip" >&2
    [ -z "$made" ] || $root rm -f "$made"
    ! command -v systemctl >/dev/null || $root systemctl disable -q ssh 2>/dev/null || true
}
# sshd run by root wants its privilege separation folder, which the service would make.
[ "$(id -u)" != 0 ] || mkdir -p /run/sshd
