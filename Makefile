# ctxcancel.h is a header: there is nothing to build to use it. This builds what proves it. `make help` lists the targets.
CC = gcc
CFLAGS = -std=c11 -O2 -g -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Wstrict-prototypes -Wundef -Werror
CPPFLAGS = -I. -Itests
LDFLAGS = -pthread
PREFIX = /usr/local
VERSION = 0.1.0
JOBS = 2

tests = $(wildcard tests/test_*.c)
scripts = $(wildcard tests/test_*.sh)
examples = $(wildcard docs/examples/*.c)
headers = ctxcancel.h $(wildcard tests/*.h)

test_programs = $(tests:tests/%.c=build/test/%)
nofutex_programs = $(tests:tests/%.c=build/nofutex/%)
example_programs = $(examples:docs/examples/%.c=build/examples/%)
programs = $(test_programs) $(nofutex_programs) $(example_programs)
# An example passes by ending with status 0 when run without arguments. Two want some: tests/test_treesum.sh and
# tests/test_ingest.sh run them.
runnable_examples = $(filter-out build/examples/treesum build/examples/ingest,$(example_programs))

compile = @mkdir -p $(@D); echo "cc $@"; $(CC) $(CPPFLAGS) $(CFLAGS) $(LDFLAGS)

help:
	@echo "make demo       build docs/examples/treesum and show it at work"
	@echo "make test       build and run the tests and the examples"
	@echo "make check      the tests in every compiler, standard, sanitizer and machine of tests/check.sh"
	@echo "make bench      measure, beside the same work in other libraries; writes bench/results.md"
	@echo "make install    ctxcancel.h and ctxcancel.pc below PREFIX (now $(PREFIX)); honours DESTDIR"
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

# -k: a test that does not compile is one failure in the sum and keeps no other from running.
test: deps
	@$(MAKE) --no-print-directory -k -j$(JOBS) programs || true
	@CC="$(CC)" tests/run.sh $(test_programs) $(scripts) TEST_QUICK=1 $(nofutex_programs) -e $(runnable_examples)

programs: $(programs)

build/test/%: tests/%.c $(headers)
	$(compile) $< -o $@

# The portable parker: the implementation compiled once, and given to the tests that do not need one in their own file.
# Those ask for it too, so they get a ctxcancel.h that takes this back.
own_implementation = $(shell grep -lE 'fault\.h|ctx__|CTXCANCEL_(STATIC|MALLOC|ASSERT)' tests/test_*.c)
nofutex_whole = $(own_implementation:tests/%.c=build/nofutex/%)
nofutex_apart = $(filter-out $(nofutex_whole),$(nofutex_programs))

build/nofutex/impl.o: ctxcancel.h
	@mkdir -p build/nofutex/apart
	@printf '#undef CTXCANCEL_IMPLEMENTATION\n#include "../../../ctxcancel.h"\n' >build/nofutex/apart/ctxcancel.h
	$(compile) -DCTXCANCEL_NO_FUTEX -DCTXCANCEL_IMPLEMENTATION -x c -c ctxcancel.h -o $@

$(nofutex_apart): build/nofutex/%: tests/%.c build/nofutex/impl.o $(headers)
	@mkdir -p $(@D); echo "cc $@"; $(CC) -Ibuild/nofutex/apart -D_DEFAULT_SOURCE $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) $< build/nofutex/impl.o -o $@

$(nofutex_whole): build/nofutex/%: tests/%.c $(headers)
	$(compile) -DCTXCANCEL_NO_FUTEX $< -o $@

build/examples/%: docs/examples/%.c ctxcancel.h
	$(compile) $< -o $@ $(LDLIBS)

build/examples/treesum: LDLIBS = -lcrypto
build/examples/ingest: LDLIBS = -lsqlite3

check: deps-dev
	@tests/check.sh

bench: deps-dev
	@bench/run.sh

format:
	clang-format -i $(tests) $(wildcard tests/*.h) $(examples) $(wildcard bench/*.[ch] bench/peers/*.c bench/peers/*.cpp)

install:
	install -d "$(DESTDIR)$(PREFIX)/include" "$(DESTDIR)$(PREFIX)/share/pkgconfig"
	install -m 644 ctxcancel.h "$(DESTDIR)$(PREFIX)/include/ctxcancel.h"
	printf '%s\n' 'prefix=$(PREFIX)' 'includedir=$${prefix}/include' '' 'Name: ctxcancel' \
	    'Description: Cancellation, deadlines, structured concurrency and graceful shutdown for C' 'Version: $(VERSION)' \
	    'Cflags: -I$${includedir} -pthread' 'Libs: -pthread' \
	    > "$(DESTDIR)$(PREFIX)/share/pkgconfig/ctxcancel.pc"

clean:
	rm -rf build

.PHONY: help deps deps-dev demo test programs check bench format install clean
