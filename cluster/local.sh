#!/usr/bin/env bash
# A real Ray cluster of two nodes on this machine: cluster/local.sh up | down | env
#
# up    starts a head and a second node in the background; does nothing where they already run
# down  ends exactly those two, and nothing else of Ray that runs on this machine
# env   prints the line that points `ray job submit` and `serve deploy` at the cluster:
#       eval "$(cluster/local.sh env)"
#
# Each may be set in the environment:
#   DDPM_CLUSTER_DIR     where pid files, logs and the token are kept (~/.cache/ddpm-translate/cluster)
#   DDPM_NODE_CPUS       CPUs each node says it has (2)
#   DDPM_OBJECT_STORE_MB object store of each node (256)
#   DDPM_GCS_PORT, DDPM_DASHBOARD_PORT   the first ports tried (6389, 8275); taken ones are skipped
#   RAY_AUTH_MODE        token (the default: whoever may submit a job runs code as you) or disabled
# shellcheck disable=SC1091
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
state=${DDPM_CLUSTER_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/ddpm-translate/cluster}
# The nodes' PATH is the jobs' PATH: `python` in an entry point must be the one that has Ray.
[ -x "$root/.venv/bin/ray" ] && export PATH="$root/.venv/bin:$PATH"

die() { echo "error: $*" >&2; exit 1; }

in_use() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# The first port from $1 on that nothing listens on and that is not among the ones chosen before.
chosen=" "
pick() {
  port=$1
  while in_use "$port" || [[ $chosen == *" $port "* ]]; do port=$((port + 1)); done
  chosen+="$port "
}

# Is the process of a pid file ours? The number alone may have been given to another process since.
alive() { # head | worker
  local pid url auth gcs temp=
  [ -f "$state/address" ] && . "$state/address"
  pid=$(cat "$state/$1.pid" 2>/dev/null) && [ -n "$pid" ] && [ -n "$temp" ] &&
    ps -ww -p "$pid" -o args= 2>/dev/null | grep -q -- "ray start .*ddpm-node=$1-${temp##*.}"
}

env_line() {
  local url auth gcs temp
  . "$state/address"
  local line="export RAY_API_SERVER_ADDRESS=$url RAY_DASHBOARD_ADDRESS=$url RAY_AUTH_MODE=$auth"
  [ "$auth" = token ] && line+=" RAY_AUTH_TOKEN_PATH='$state/token'"
  echo "$line"
}

start_node() { # name, arguments of `ray start`
  local name=$1
  shift
  nohup ray start --block --disable-usage-stats \
    --num-cpus="${DDPM_NODE_CPUS:-2}" --object-store-memory=$((${DDPM_OBJECT_STORE_MB:-256} * 1048576)) \
    --labels="ddpm-node=$name-${temp##*.}" "$@" >"$state/$name.log" 2>&1 </dev/null &
  echo $! >"$state/$name.pid"
}

wait_for() { # name, what it is, a command that succeeds once it is there
  local name=$1 what=$2 i
  shift 2
  for ((i = 0; i < 600; i++)); do
    "$@" && return
    alive "$name" || { tail -n 20 "$state/$name.log" >&2; down quiet; die "$what did not start; the end of its log is above"; }
    sleep 0.2
  done
  down quiet
  die "$what did not answer within two minutes; see $state/$name.log"
}

second_node_is_in() { grep -q "Ray runtime started" "$state/worker.log"; }

up() {
  local url auth gcs temp
  command -v ray >/dev/null || die "ray is not installed; run make setup"
  command -v ps >/dev/null || die "ps is not installed; apt-get install procps"
  if alive head && alive worker; then
    echo "The cluster is up already."
  else
    down quiet
    start
  fi
  . "$state/address"
  echo "dashboard  $url"
  echo "to use it  $(env_line)"
  echo "then       ray job submit --working-dir $root -- python -m jobs.train …   (absolute paths or s3:// URIs)"
  echo "to end it  make cluster-down"
}

start() {
  mkdir -p "$state"
  chmod 700 "$state"
  local auth=${RAY_AUTH_MODE:-token} temp url gcs dashboard agents=() port
  [[ $auth == token || $auth == disabled ]] || die "RAY_AUTH_MODE is $auth; it must be token or disabled"
  if [ "$auth" = token ]; then
    unset RAY_AUTH_TOKEN
    export RAY_AUTH_TOKEN_PATH="$state/token"
    [ -s "$state/token" ] || (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$state/token")
  fi
  temp=$(mktemp -d "/tmp/ddpm-ray.XXXXXX") # short: Ray puts unix sockets below it
  pick "${DDPM_GCS_PORT:-6389}"; gcs=$port
  pick "${DDPM_DASHBOARD_PORT:-8275}"; dashboard=$port
  for _ in 1 2 3; do pick 52400; agents+=("$port"); done
  url=http://127.0.0.1:$dashboard
  printf '%s\n' "url=$url" "auth=$auth" "temp=$temp" "gcs=127.0.0.1:$gcs" >"$state/address"
  # What workers ask for the state of the cluster must be this one, whatever else of Ray runs on the machine.
  export RAY_AUTH_MODE=$auth RAY_API_SERVER_ADDRESS=$url
  unset RAY_ADDRESS
  export RAY_JOB_STOP_WAIT_TIME_S=${RAY_JOB_STOP_WAIT_TIME_S:-60} # `ray job stop` kills after 3 s otherwise
  export RAY_worker_niceness=${RAY_worker_niceness:-0} # by default Ray's workers get what everything else leaves
  start_node head --head --port="$gcs" --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
    --ray-client-server-port="${agents[2]}" --dashboard-agent-listen-port="${agents[0]}" --temp-dir="$temp"
  wait_for head "the head" in_use "$dashboard"
  start_node worker --address="127.0.0.1:$gcs" --dashboard-agent-listen-port="${agents[1]}"
  wait_for worker "the second node" second_node_is_in
  echo "A Ray cluster of two nodes is up, ${DDPM_NODE_CPUS:-2} CPUs each."
}

down() {
  local name i any=
  for name in worker head; do
    alive "$name" && any=1 && kill -TERM "$(cat "$state/$name.pid")" 2>/dev/null || true
  done
  for name in worker head; do
    if alive "$name"; then
      # After jobs, Ray may take half a minute to end by itself. Its processes end with the one killed here.
      for ((i = 0; i < 25; i++)); do alive "$name" || break; sleep 0.2; done
      alive "$name" && kill -KILL "$(cat "$state/$name.pid")" 2>/dev/null || true
    fi
    rm -f "$state/$name.pid"
  done
  if [ -f "$state/address" ]; then
    local url auth gcs temp=
      . "$state/address"
    for ((i = 0; i < 50; i++)); do ps -ww -eo args= | grep -v grep | grep -qF -- "$temp/" || break; sleep 0.2; done
    case $temp in /tmp/ddpm-ray.*) # what ends last may still write there
      for ((i = 0; i < 50; i++)); do rm -rf "$temp" 2>/dev/null && break; sleep 0.2; done
      rm -rf "$temp" ;;
    esac
    rm -f "$state/address"
  fi
  [ "${1:-}" = quiet ] || { [ -n "$any" ] && echo "The cluster is down." || echo "No cluster of ours was up."; }
}

case ${1:-} in
  up) up ;;
  down) down ;;
  env)
    alive head || die "no cluster is up; run make cluster"
    env_line
    ;;
  *) die "usage: cluster/local.sh up | down | env" ;;
esac
