#!/usr/bin/env bash
# From a fresh clone to a model that chats: environment, demo data, pretraining, instruction tuning, figures.
#
#   bash scripts/quickstart.sh                     tiny on a CPU, small where there is a CUDA device
#   bash scripts/quickstart.sh --size small        tiny, small, base or moe
#   bash scripts/quickstart.sh --fast              a few steps of everything, to see that it works; into out/fast
#
# Run again, it skips what is finished and continues what was interrupted. Logs: out/quickstart/.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh

# ---- settings of the stages: chosen so that tiny takes under 15 minutes on 2 CPU cores ------------------------------

pretrain_settings() {
  case $1 in
    fast) echo "--optimizer muon --max_steps 60 --batch_size 8 --max_seq_len 256 --learning_rate 8e-3" ;;
    tiny) echo "--optimizer muon --max_steps 800 --batch_size 16 --max_seq_len 256 --learning_rate 8e-3" ;;
    small) echo "--optimizer muon --epochs 2 --batch_size 32 --learning_rate 4e-3" ;;
    base) echo "--optimizer muon --epochs 2 --batch_size 32 --learning_rate 2e-3" ;;
    moe) echo "--optimizer muon --epochs 2 --batch_size 32 --learning_rate 2e-3" ;;
  esac
}

sft_settings() {
  case $1 in
    fast) echo "--optimizer muon --max_steps 60 --batch_size 8 --max_seq_len 256 --learning_rate 3e-3" ;;
    tiny) echo "--optimizer muon --epochs 7 --batch_size 8 --max_seq_len 256 --learning_rate 3e-3" ;;
    small) echo "--optimizer muon --epochs 8 --batch_size 16 --learning_rate 2e-3" ;;
    base) echo "--optimizer muon --epochs 6 --batch_size 16 --learning_rate 1e-3" ;;
    moe) echo "--optimizer muon --epochs 6 --batch_size 16 --learning_rate 1e-3" ;;
  esac
}

common_settings="--save_interval 500 --log_interval 50"

# ---- arguments -----------------------------------------------------------------------------------------------------

again="bash scripts/quickstart.sh${*:+ $*}"
size="" fast="" out=out questions=100
while [ $# -gt 0 ]; do
  case $1 in
    --fast) fast=fast out=out/fast questions=20 ;;
    --size) size=${2:-none} && shift ;;
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" && exit ;;
    *) die "unknown argument $1; there are --size and --fast" ;;
  esac
  shift || true
done
case $size in "" | tiny | small | base | moe) ;; *) die "--size is one of tiny, small, base and moe" ;; esac

# ---- helpers -------------------------------------------------------------------------------------------------------

step_number=0 in_step="" interrupted=""
trap 'interrupted=yes; [ -n "$in_step" ] || exit 130' INT

title() {
  step_number=$((step_number + 1))
  printf '\n[%s/4] %s\n' "$step_number" "$1"
}

# Runs a command, its output on the terminal and in a log. If it fails, says what to do and ends the script.
run_step() { # run_step NAME COMMAND...
  local name=$1 log="$logs/$1.log" code=0 start=$SECONDS
  shift
  printf '  %s\n' "$*"
  in_step=yes
  "$python" scripts/run_logged.py "$log" "$@" || code=$?
  in_step=""
  if [ -n "$interrupted" ] || [ $code -eq 130 ]; then
    printf '\nStopped in step %s. To continue: %s\n' "$name" "$again" >&2
    exit 130
  elif [ $code -ne 0 ]; then
    {
      printf '\nStep %s failed (exit code %s). What it printed: %s\n' "$name" "$code" "$log"
      printf 'The command was: %s\nTo continue:     %s\n' "$*" "$again"
    } >&2
    exit 1
  fi
  printf '  done in %s s\n' $((SECONDS - start))
}

# Runs a step, unless the same command has made this result of the same inputs before. A training that was interrupted
# is resumed. NAME.started and NAME.finished beside the log hold the command and the checksums of inputs and result.
run_once() { # run_once NAME RESULT "INPUTS" COMMAND...
  local name=$1 result=$2 inputs=$3 resume="" signature
  local started="$logs/$1.started" finished="$logs/$1.finished" resume_file="${2%.json}_resume.pth"
  shift 3
  signature=$(echo "$*" && { cksum $inputs 2>/dev/null || true; })
  if [ -f "$result" ] && [ "$(cat "$finished" 2>/dev/null)" = "$signature $(cksum <"$result")" ]; then
    skipped=yes
    echo "  finished before: $result"
    return
  fi
  skipped=""
  if [ "$(cat "$started" 2>/dev/null)" = "$signature" ] && [ "$resume_file" -nt "$started" ]; then
    resume=--resume
  else
    echo "$signature" >"$started"
  fi
  run_step "$name" "$@" $resume
  echo "$signature $(cksum <"$result")" >"$finished"
}

# ---- the steps -----------------------------------------------------------------------------------------------------

ensure_venv requirements.txt requirements-demo.txt
export HF_HUB_OFFLINE=1 # from here on nothing needs a network

began=$SECONDS
if [ -z "$size" ]; then
  size=$("$python" -c 'import torch; print("small" if torch.cuda.is_available() else "tiny")')
fi
suffix=$("$python" -c "from model.LMConfig import LMConfig; print(LMConfig.from_size('$size').name_suffix)")
logs=$out/quickstart
mkdir -p "$logs"
stage="--size $size --out_dir $out $common_settings"
pretrain=$out/pretrain_$suffix.json sft=$out/full_sft_$suffix.json report=$out/report_$suffix.json
tokenizer=model/minimind_tokenizer/tokenizer.json

title "Demo data: Chinese text from the installed packages, into dataset/"
if [ -f dataset/pretrain_data.csv ] && [ -f dataset/sft_data.csv ]; then
  echo "  there already: dataset/pretrain_data.csv, dataset/sft_data.csv"
else
  run_step data "$python" data_process.py demo
fi

title "Pretraining: the $size model learns to continue text"
run_once "pretrain_$size" "$pretrain" "dataset/pretrain_data.csv dataset/pretrain_val.csv $tokenizer" \
  "$python" 1-pretrain.py $stage $(pretrain_settings "${fast:-$size}")

title "Instruction tuning: it learns to answer"
run_once "full_sft_$size" "$sft" "$pretrain dataset/sft_data.csv dataset/sft_val.csv" \
  "$python" 3-full_sft.py $stage $(sft_settings "${fast:-$size}")

title "Report: held-out figures, answers to questions it was trained on and to others, sample conversations"
run_once "report_$size" "$report" "$pretrain $sft dataset/sft_data.csv dataset/sft_val.csv dataset/sft_val_new.csv" \
  "$python" scripts/report.py --size "$size" --out_dir "$out" --questions "$questions"
[ -z "$skipped" ] || cat "$logs/report_$size.log"

printf '\nAll done, in %s min. To chat with the model:\n\n  %s 2-eval.py --size %s%s\n\n' \
  $(((SECONDS - began + 59) / 60)) "$python" "$size" "${fast:+ --out_dir $out}"
