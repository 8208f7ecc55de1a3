#!/bin/sh
# Train the released models again, the most valuable first, export them to releases/, and study them.
# Type it in the activated environment of a git checkout: sweeps/release.sh. The first runs continue
# the releases that were trained on the first edition of the sample, which commit 9020cdf contains.
# If the script is started again, finished runs are kept, and a run that was stopped continues.
set -e
cd "$(dirname "$0")/.."
mkdir -p runs/first
git archive 9020cdf releases/medium releases/large |
    tar -x -C runs/first --strip-components=1

for size in large_a large_b large_student large medium_student medium_continued medium small_student small w64; do
    python train.py experiment=release_$size name="$(echo $size | tr _ -)" resume=auto
done

for size in large medium small; do
    minigpt export runs/$size releases/$size --format safetensors --license mit --evaluate
done
rm -rf releases/w64/snapshots  # export replaces only folders without other files
minigpt export runs/w64 releases/w64 --format safetensors --license mit --evaluate
cp -r runs/w64/snapshots releases/w64/
python -m tests.golden --record-releases
minigpt study releases/small releases/medium releases/large --out docs/results
