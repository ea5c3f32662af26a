//! The long texts of `--help` and the manual pages.

/// Heading of the options that every command has.
pub const EVERYWHERE: &str = "Everywhere";

pub const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed; the process still runs where it was
  2  usage
  3  refused by preflight; nothing was touched
  4  outcome unknown, the process is frozen: run `migrate recover`";

pub const RESTORE_EXIT_CODES: &str = "\
Exit codes:
  Once the program runs, its own: its status, or 128 and the number of the signal that ended it.
  Before that, and always with --detach:
  0  done (--detach)
  1  failed; nothing runs, the checkpoint is as it was
  2  usage
  3  refused by preflight; nothing was started
  4  outcome unknown: run `migrate recover`";

pub const CHECK_EXIT_CODES: &str = "\
Exit codes:
  0  it can move, perhaps with an effect that is named
  1  could not find out
  2  usage
  3  it cannot move; what stands in the way is named, with the fix";

pub const MIGRATE: &str = "\
Moves a running process tree from one Linux host to another while it keeps running. Its memory is \
copied in rounds meanwhile; it is frozen only for what it wrote last, goes on at the destination where it stopped, and \
gets on demand what could not be copied in time: same pids, open files, pipes, timers, listening ports.

On the host that is to take it:
  # migrate receive
and on the host where it runs, the command that `receive` printed:
  # migrate send 4242 10.0.0.2:7878 --ticket ...

Can it be moved at all?
  # migrate check 4242
  # migrate check 4242 10.0.0.2:7878

Into a directory instead of to a host:
  # migrate checkpoint 4242 --dir /srv/images --name before-upgrade
  # migrate restore --dir /srv/images --name before-upgrade

Until the destination has taken over, any failure leaves the program running where it was. Files are not copied: they \
must exist on the destination and be the same, which is checked before anything is touched.";

pub const BENCH: &str = "\
Measures how long programs stand still when they are moved: as the program itself sees it, as a client sees it that \
asks it all the time, and as the agents say, beside what all three see without a migration. With no option it makes two hosts \
on this machine (network, mount and pid namespaces, gone afterwards; root, iproute2), moves a built-in program of several sizes and \
modes and prints a table in about a minute. What plain QUIC, TCP and memory copying carry is measured in the same run.

Examples:
  About a minute on this machine, with charts:
    # migrate bench --report bench.html
  A workload that is like yours:
    # migrate bench --size 4GiB --rate 50MB/s,200MB/s --pattern zipf --threads 64 --mode hybrid,post-copy --repeat 10
  A command of your own, by the pauses in its output:
    # migrate bench --workload 'ping 127.0.0.1 -i 0.01'
  A slow link:
    # migrate bench --round-trip 80ms --link 100Mbit/s
  Beside a CRIU that is not in PATH:
    # migrate bench --criu /opt/criu/criu
  Two real machines: `migrate receive` on the other one, with the same program at the same path there, and here
    # migrate bench --to 10.0.0.2:7878 --ticket ...";

pub const RECEIVE: &str = "\
Waits for process trees from other hosts and runs them here. Prints the command to type on the other host, with a \
ticket that is good once, for ten minutes (--ticket-lifetime); afterwards the two hosts know each other and need no ticket.

Examples:
  Take programs until Ctrl-C:
    # migrate receive
  Take one, in a script, its output to a file:
    # migrate receive --once --ticket-file /run/ticket --stdio /var/log/counter.log
  Listen on one address and port only:
    # migrate receive --listen 10.0.0.2:9000

Whoever holds the ticket, or is trusted already, may run programs here as the user of this command. An unknown host is \
told nothing.

Touched: the state directory (identity, trusted peers, journal), the ticket file, and what the programs themselves \
touch. The command to type is printed on stdout, with --ticket-file on stderr; summaries go to stderr as long as the \
program shares stdout (--stdio inherit). With --json each migration gives one object, one a line: use --stdio null or \
a FILE to keep the program's output apart.

Ctrl-C ends the waiting; a migration in progress is undone first and its program goes on at the sender. Programs \
received earlier are not affected.";

pub const SEND: &str = "\
Moves process PID and all its descendants to a host where `migrate receive` waits. First the preflight: whatever \
cannot be moved is named, with its fix, before anything is stopped. Then the program is frozen, everything is \
copied, and the destination takes over.

Examples:
  First contact, as `migrate receive` printed it:
    # migrate send 4242 10.0.0.2:7878 --ticket T
  What would happen, and how long would the freeze be?
    # migrate send 4242 10.0.0.2:7878 --dry-run
  Some of the network left to others:
    # migrate send 4242 node2:7878 --bandwidth 500MB/s

Touched: nothing on disk but the journal in the state directory. The original ends when the copy runs and has all \
its memory; with --leave-running it goes on. Files are not copied.

Ctrl-C, before the destination has taken over: the program goes on here, nothing stays behind there. Later it is \
too late to undo, and the migration is finished.";

pub const CHECKPOINT: &str = "\
Saves process PID and all its descendants under a name in a directory, to be started again with `migrate restore`: \
here or, with the directory copied, on another host. The program ends when it is saved; with --leave-running it goes on.

Examples:
  # migrate checkpoint 4242 --dir /srv/images --name before-upgrade
  # migrate checkpoint 4242 --dir /srv/images --name hourly-1 --leave-running
  # migrate checkpoint 4242 --dir /srv/images --name hourly-2 --leave-running --parent hourly-1

Touched: the directory (made if missing; the checkpoint appears whole or not at all). Files the program has open are \
not saved: they must be there, and the same, when it is restored.

Ctrl-C: the program goes on, nothing stays in the directory.";

pub const RESTORE: &str = "\
Starts a saved process tree again, where it was when it was saved, with the same pids. Waits for it and ends as it \
ends; signals that reach this command are passed on to it. With --detach it stays alone in the background.

Examples:
  The newest checkpoint in a directory:
    # migrate restore --dir /srv/images
  By name, in the background:
    # migrate restore --dir /srv/images --name before-upgrade --detach --stdio /var/log/app.log

Touched: the checkpoint is only read, and can be restored again. A damaged, truncated or newer one is refused, and \
nothing is started. Without --detach the summary goes to stderr: stdout is the program's.";

pub const LIST: &str = "\
Lists the checkpoints in a directory, oldest first. Reads only.

Examples:
  # migrate list --dir /srv/images
  # migrate list --dir /srv/images --json | jq -r '.images[].name'";

pub const RM: &str = "\
Removes a checkpoint. One that others build on (--parent) is kept, and they are named. Programs restored from it go on.

Examples:
  # migrate rm --dir /srv/images before-upgrade
  # migrate rm --dir /srv/images hourly-1 --json";

pub const SHOW: &str = "\
Shows what a checkpoint holds: processes, threads, open files, memory, and the host it was taken on. Reads only.

Examples:
  # migrate show --dir /srv/images before-upgrade
  # migrate show --dir /srv/images before-upgrade --json";

pub const CHECK: &str = "\
Says what can move, what cannot, and what to do about it. Nothing is touched, nothing is moved.

Examples:
  What this host's kernel and privileges allow:
    # migrate check
  What a process holds, and whether each thing can move:
    # migrate check 4242
  Whether a receiver answers and takes programs from here:
    # migrate check 10.0.0.2:7878
  The whole preflight, against a real receiver:
    # migrate check 4242 10.0.0.2:7878 --ticket T";

pub const RECOVER: &str = "\
After a crash of an agent or a host in the middle of a hand-over a program may stay frozen, so that it never runs \
twice. Without ID such hand-overs are listed; with one, it is finished, or with --abort undone where the other side \
did not take over.

Examples:
  # migrate recover
  # migrate recover 5f3a9c
  # migrate recover 5f3a9c --abort

Touched: the program of that hand-over, and its journal in the state directory.";

pub const TRUST: &str = "\
Hosts that may send programs to this one and receive from it, known by their fingerprints. A ticket (`migrate \
receive`) enters both hosts by itself; this is the way by hand.

Examples:
  # migrate trust list
  # migrate trust add FINGERPRINT --name node2
  # migrate trust remove node2

Touched: the list in the state directory.";

pub const COMPLETIONS: &str = "\
Prints a completion script for a shell on stdout.

Examples:
  # migrate completions bash > /etc/bash_completion.d/migrate
  $ migrate completions zsh > ~/.zfunc/_migrate
  $ migrate completions fish > ~/.config/fish/completions/migrate.fish";

pub const MAN: &str = "\
Prints the manual page on stdout; with --dir writes one for every command.

Examples:
  $ migrate man | man -l -
  # migrate man --dir /usr/local/share/man/man1";
