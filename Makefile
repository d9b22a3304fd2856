# Everything there is to do here; `make help` lists it.
#
# Variables: PORT (8080), FUZZ_SECONDS (5; 600 in soak), NO_INSTALL=1 (never install anything), CA_BUNDLE, PIP_INDEX_URL, BASE_IMAGE (see scripts/images)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# The steps take turns: they share two things that bear one user at a time, cargo's folder and the engine.
.NOTPARALLEL:

CARGO_TEST := $(shell command -v cargo-nextest >/dev/null && echo nextest run || echo test)

.PHONY: help
help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## install and start what is missing (NO_INSTALL=1: only say what)
	@scripts/setup

.PHONY: images
images: setup ## build the images for sessions, of all languages
	@scripts/images

.PHONY: guest
guest: setup ## build the guest for the tests, beside the dev build of the server
	@scripts/build dev guest

.PHONY: server
server: setup ## build the guest and the server, optimised
	@scripts/build release

.PHONY: run
run: setup ## build what is missing, start a server on 127.0.0.1:$PORT and prove that it works
	@scripts/run

# Pythons that tests run outside a container: a kernel, and what reads notebooks and runs them again.
.PHONY: test-kernel
test-kernel:
	@scripts/setup test
	@scripts/test-kernel

.PHONY: test
test: images guest test-kernel ## every test, with real containers, then the lints
	cargo test --locked --workspace --doc
	cargo $(CARGO_TEST) --locked --workspace
	@scripts/fuzz $${FUZZ_SECONDS:-5}
	@$(MAKE) --no-print-directory lint

.PHONY: lint
lint: ## formatting, clippy, documentation, licences, shell
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	@if command -v c++ >/dev/null; then scripts/fuzz --lint; else echo "skipped: there is no C++ compiler, which the fuzz targets need"; fi
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --quiet
	@if command -v cargo-deny >/dev/null; then cargo deny --locked check bans licenses sources; else echo "skipped: cargo-deny is not installed"; fi
	@if command -v shellcheck >/dev/null; then scripts/lint-shell; else echo "skipped: shellcheck is not installed"; fi

.PHONY: bench
bench: images server ## measure: starts, executions, boots, memory (release build, real containers); BENCH names some
	scripts/test-kernel bench
	cargo bench --locked --bench compare -- $(BENCH)

.PHONY: soak
soak: images server test-kernel ## the long proofs: sessions under faults for SOAK_SECONDS (3600), a thousand executions, endless prints, a hundred kills, crowds, greed, fuzzing
	SOAK_SECONDS=$${SOAK_SECONDS:-3600} cargo test --locked --release --test soak --test executions --test recovery --test crowd --test chaos --test load --test jupyter_hostile --test e2b_crowd -- --ignored --nocapture --test-threads=1
	scripts/fuzz $${FUZZ_SECONDS:-600}

.PHONY: compose-up
compose-up: server ## the whole thing with docker compose
	@scripts/setup compose
	@scripts/images base python data server
	@scripts/compose up --detach

.PHONY: compose-down
compose-down: ## stop what compose-up started; data stays
	@scripts/compose down

.PHONY: clean-containers
clean-containers: ## remove the containers of every Cellblock server on this engine, nothing else
	@scripts/clean containers

.PHONY: uninstall
uninstall: ## remove containers, volumes and images of ours, and the data folder
	@scripts/clean everything
