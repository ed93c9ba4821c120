#!/usr/bin/env bash
exec bash "$(dirname "$0")/gpu/suite.sh" "$@"
