#!/usr/bin/env bash
# The last screen of a quick start: launch/show_result.sh RUN OTHER_QUICKSTART
set -euo pipefail
run=$1 other=$2

echo
python -m train.evaluate "$run" --baselines
config=configs/vision/quickstart.yaml
if [[ $run == runs/quickstart ]]; then
    config=configs/language/quickstart.yaml
    echo
    python -m train.generate "$run" --prompt "The history of"
fi
steps=$(sed -n 's/^  steps: //p' "$run/config.yaml")
cat <<END

Next:
  source .venv/bin/activate
  launch/local.sh $config train.steps=$((2 * steps))   # resume: train this run for longer
  tensorboard --logdir runs   # watch it
  make $other
END
