# ctxcancel.h is a header: there is nothing to build to use it. This builds what proves it. `make help` lists the targets.
CC = gcc
CFLAGS = -std=c11 -O2 -g -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Wstrict-prototypes -Wundef -Werror
CPPFLAGS = -I. -Itests
LDFLAGS = -pthread
PREFIX = /usr/local
VERSION = 0.1.0
LIBS = -pthread
JOBS = 2

tests = $(wildcard tests/test_*.c)
scripts = $(wildcard tests/test_*.sh)
# An example whose library is missing is left out; the last lines of `make test` name it. What pkg-config calls them:
needs = event_loop_uv:libuv event_loop_glib:glib-2.0
lacks = $(foreach need,$(needs),$(shell pkg-config --exists $(word 2,$(subst :, ,$(need))) 2>/dev/null || echo $(word 1,$(subst :, ,$(need)))))
lacks += $(if $(filter Linux,$(shell uname)),,event_loop_epoll)
skipped_examples = $(strip $(lacks))
all_examples = $(wildcard docs/examples/*.c)
examples = $(filter-out $(skipped_examples:%=docs/examples/%.c),$(all_examples))
headers = ctxcancel.h $(wildcard tests/*.h)

test_programs = $(tests:tests/%.c=build/test/%)
nofutex_programs = $(tests:tests/%.c=build/nofutex/%)
example_programs = $(examples:docs/examples/%.c=build/examples/%)
programs = $(test_programs) $(nofutex_programs) $(example_programs)
# An example passes by ending with status 0 when run without arguments. Two want some: tests/test_treesum.sh and
# tests/test_ingest.sh run them.
runnable_examples = $(filter-out build/examples/treesum build/examples/ingest,$(example_programs))

compile = @mkdir -p $(@D); echo "cc $@"; $(CC) $(CPPFLAGS) $(CFLAGS) $(LDFLAGS)
compile_test = @mkdir -p $(@D); echo "cc $@"; $(CC) $(apart_flags) $(CPPFLAGS) $(CFLAGS) $(test_optimise) $(LDFLAGS) $(parker)

help:
	@echo "make demo       build docs/examples/treesum and show it at work"
	@echo "make test       build and run the tests, their storms shortened, and the examples"
	@echo "make check      the tests at full length, and in every compiler, sanitizer and machine of tests/check.sh"
	@echo "make explore    the schedules of the real code, for TIME=seconds (600); every failure can be replayed"
	@echo "make bench      measure, beside the same work in other libraries; writes bench/results.md"
	@echo "                (bench/run.sh --against COMMIT: beside that commit's header; writes build/against.md)"
	@echo "make install    ctxcancel.h, with man pages and files for pkg-config and CMake, below PREFIX (now $(PREFIX));"
	@echo "                honours DESTDIR; make uninstall takes them away"
	@echo "                (LIBS='-pthread -latomic' for processors without 64-bit atomics: see README.md)"
	@echo "make deps       install what demo and test need; they call it themselves"
	@echo "make deps-dev   install what check and bench need; they call it themselves"
	@echo "make format     clang-format tests, bench and examples"
	@echo "make clean      remove build/"

deps:
	@CC="$(CC)" tests/deps.sh base

deps-dev:
	@CC="$(CC)" tests/deps.sh dev

demo: deps
	@$(MAKE) --no-print-directory build/examples/treesum
	@docs/examples/demo.sh build/examples/treesum

# -k: a test that does not compile is one failure in the sum and does not keep the others from running.
# TEST_SHARE shortens the storms, TEST_QUICK more so. `make check` runs all of them at full length.
test: deps
	@$(MAKE) --no-print-directory -k -j$(JOBS) programs || true
	@CC="$(CC)" JOBS=$(JOBS) tests/run.sh TEST_SHARE=10 $(scripts) $(test_programs) TEST_QUICK=1 $(nofutex_programs) \
	    SKIPPED="$(skipped_examples:%=example_%)" -e $(runnable_examples)

programs: $(programs)

# The implementation is compiled once for each parker, as a user would compile it. Only the tests that look inside the
# implementation, or configure it, compile their own. The others ask for it too, so they get a ctxcancel.h that takes
# this back.
own_implementation = $(shell grep -lE 'fault\.h|ctx__|define pthread_|CTXCANCEL_(STATIC|MALLOC|ASSERT|TEST_)' tests/test_*.c)
test_whole = $(own_implementation:tests/%.c=build/test/%)
test_apart = $(filter-out $(test_whole),$(test_programs))
nofutex_whole = $(own_implementation:tests/%.c=build/nofutex/%)
nofutex_apart = $(filter-out $(nofutex_whole),$(nofutex_programs))
apart = -Ibuild/apart -D_DEFAULT_SOURCE# which the implementation would define in strict ISO mode
test_optimise = -O1# most of the time of `make test` would go into -O2

build/apart/ctxcancel.h:
	@mkdir -p $(@D)
	@printf '#undef CTXCANCEL_IMPLEMENTATION\n#include "../../ctxcancel.h"\n' >$@

build/nofutex/%: parker = -DCTXCANCEL_NO_FUTEX

build/test/impl.o build/nofutex/impl.o: ctxcancel.h
	$(compile) $(parker) -DCTXCANCEL_IMPLEMENTATION -x c -c ctxcancel.h -o $@

$(test_apart): apart_flags = $(apart)
$(nofutex_apart): apart_flags = $(apart)
$(test_apart): build/test/%: tests/%.c build/test/impl.o build/apart/ctxcancel.h $(headers)
	$(compile_test) $< build/test/impl.o -o $@

$(nofutex_apart): build/nofutex/%: tests/%.c build/nofutex/impl.o build/apart/ctxcancel.h $(headers)
	$(compile_test) $< build/nofutex/impl.o -o $@

$(test_whole): build/test/%: tests/%.c $(headers)
	$(compile_test) $< -o $@

$(nofutex_whole): build/nofutex/%: tests/%.c $(headers)
	$(compile_test) $< -o $@

build/examples/%: docs/examples/%.c ctxcancel.h
	$(compile) $< -o $@ $(LDLIBS)

build/examples/treesum: LDLIBS = -lcrypto
build/examples/ingest: LDLIBS = -lsqlite3
build/examples/event_loop_uv: package = libuv
build/examples/event_loop_glib: package = glib-2.0
build/examples/event_loop_uv build/examples/event_loop_glib: CPPFLAGS += $(subst -I,-isystem ,$(shell pkg-config --cflags $(package)))
build/examples/event_loop_uv build/examples/event_loop_glib: LDLIBS = $(shell pkg-config --libs $(package))

# The schedules of the real code: tests/sched/sched.h. With addresses that stay the same, so without -pie.
TIME = 600
sched_themes = $(patsubst tests/sched/scenarios_%.c,%,$(wildcard tests/sched/scenarios_*.c))
sched_programs = $(sched_themes:%=build/sched/%) $(sched_themes:%=build/sched/races/%)
sched_compile = @mkdir -p $(@D); echo "cc $@"; $(CC) -std=gnu11 -O1 -g -Wall -Wextra -Wno-unused-function -no-pie -pthread -I.


explore: deps
	@$(MAKE) --no-print-directory -j$(JOBS) $(sched_programs)
	@tests/sched/explore.sh $(TIME) $(sched_programs)

build/sched/%.o: tests/sched/%.c tests/sched/sched.h ctxcancel.h
	$(sched_compile) -c $< -o $@

build/sched/%: tests/sched/scenarios_%.c build/sched/sched.o ctxcancel.h tests/sched/sched.h
	$(sched_compile) -c $< -o $@.o && $(CC) -no-pie -pthread $@.o build/sched/sched.o -o $@

# Compiled for the thread sanitizer, but linked with tests/sched/races.c in its place.
build/sched/races/%: tests/sched/scenarios_%.c build/sched/sched.o build/sched/races.o ctxcancel.h tests/sched/sched.h
	$(sched_compile) -fsanitize=thread -c $< -o $@.o && \
	    $(CC) -no-pie -pthread $@.o build/sched/sched.o build/sched/races.o -o $@

check: deps-dev
	@tests/check.sh

bench: deps-dev
	@bench/run.sh

format:
	clang-format -i $(tests) $(wildcard tests/*.h) $(all_examples) $(wildcard bench/*.[ch] bench/peers/*.c bench/peers/*.cpp)

install:
	@PREFIX="$(PREFIX)" docs/install/install.sh "$(DESTDIR)$(PREFIX)" "$(VERSION)" "$(LIBS)"

uninstall:
	@docs/install/install.sh -u "$(DESTDIR)$(PREFIX)"

clean:
	rm -rf build

.PHONY: help deps deps-dev demo test programs explore check bench format install uninstall clean
