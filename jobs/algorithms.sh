#!/usr/bin/env bash
# Every algorithm of the paper's comparison on MNIST: the same model, data and epochs, each with
# settings that suit it. Ends with a table of what they reached and what it took.
#   bash jobs/algorithms.sh data.path=/scratch/mnist [more overrides of jobs/mnist.toml]
# A run that is there goes on where it stopped, so a finished one is not made again; they stand in
# runs/algorithms. Algorithms with a server have one rank more.
set -euo pipefail
cd "$(dirname "$0")/.."
source jobs/venv.sh mpich
same=(model.name=mlp 'model.args.hidden=[256]' run.epochs=15 "$@")

run() { # name, ranks, settings
    echo "== $1: mpiexec -n $2 ... ${*:3}"
    mpiexec -n "$2" mpicdsgd train jobs/mnist.toml "run.dir=runs/algorithms/$1" "${@:3}" "${same[@]}"
}

run sgd 5 optim.name=sgd optim.lr=0.2
run msgd 5 optim.name=msgd optim.lr=0.01 optim.momentum=0.95
run fedavg 5 optim.name=fedavg optim.lr=0.2 optim.local_epochs=1 optim.fraction=1.0
run easgd 5 optim.name=easgd optim.lr=0.3 optim.period=4
run easgd-server 6 optim.name=easgd optim.lr=0.3 optim.period=4 optim.asynchronous=true
run eamsgd 5 optim.name=eamsgd optim.lr=0.02 optim.momentum=0.95 optim.period=4
run downpour 6 optim.name=downpour optim.lr=0.05
run downpour-adagrad 6 optim.name=downpour optim.lr=0.01 optim.adagrad=true
run gossip 5 optim.name=gossip optim.lr=0.2 optim.probability=0.5
run gosgd 5 optim.name=gosgd optim.lr=0.3 optim.probability=0.5
run cdsgd 5 optim.name=cdsgd optim.lr=0.2
run icdsgd 5 optim.name=icdsgd optim.lr=0.2 optim.rounds=2
run cdmsgd 5 optim.name=cdmsgd optim.lr=0.01 optim.momentum=0.95
mpicdsgd compare runs/algorithms/{sgd,msgd,fedavg,easgd,easgd-server,eamsgd,downpour,downpour-adagrad,gossip,gosgd,cdsgd,icdsgd,cdmsgd}
