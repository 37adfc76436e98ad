//! Every device against attacks that have names, and against any that chance comes up with.

use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;

use super::attacks::{self, Outcome};
use super::operation::{self, Operation};
use super::targets::ALL;
use super::*;

/// All seeds of a target: attacks on its queue, and requests of its kind.
fn seeds(target: &Target) -> Vec<Seed> {
    let queue = (target.probe)().queue as u8;
    let attacks = attacks::on_queue(queue).into_iter().map(|(seed, _)| seed);
    attacks.chain((target.seeds)()).collect()
}

#[test]
fn a_device_asks_for_a_reset_when_its_queue_is_broken_and_works_again_after_it() {
    for target in ALL {
        let queue = (target.probe)().queue as u8;
        for ((name, steps), outcome) in attacks::on_queue(queue) {
            let mut machine = Machine::new(target);
            steps.iter().for_each(|step| machine.apply(step));
            let what = format!("{}: {name}", target.name);
            if outcome != Outcome::Open {
                let broken = outcome == Outcome::NeedsReset;
                assert_eq!(machine.needs_reset(), broken, "{what}");
                assert_eq!(machine.transport.malformed(), u64::from(broken), "{what}");
            }
            machine.settle();
            machine.probe();
        }
    }
}

#[test]
fn steps_come_back_from_the_bytes_they_are_written_as() {
    for target in ALL {
        for (name, steps) in seeds(target) {
            let bytes = operation::encode(&steps);
            let read: Vec<Operation> = operation::decode(&bytes).collect();
            assert_eq!(read, steps, "{}: {name}", target.name);
        }
    }
}

#[test]
fn the_seeds_do_what_they_are_named_for_and_no_device_falls_over_them() {
    for target in ALL {
        for (_, steps) in seeds(target) {
            attack(target, &operation::encode(&steps));
        }
    }
}

/// With `SARANG_SEEDS=write` in the environment, writes `fuzz/corpus/`; otherwise sees that it is up to date.
#[test]
fn the_seeds_in_the_corpus_are_these() {
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    if !corpus.exists() {
        // A published package has no fuzz targets.
        return;
    }
    let write = std::env::var_os("SARANG_SEEDS").is_some_and(|value| value == "write");
    let mut all = Vec::new();
    for target in ALL {
        let seeds = seeds(target).into_iter();
        let seeds = seeds.map(|(name, steps)| (name, operation::encode(&steps)));
        all.push((target.name, seeds.collect::<Vec<_>>()));
    }
    let alone = attacks::on_queue(0).into_iter().map(|((name, steps), _)| {
        // A queue of 8, and of the steps those that it has to do with.
        (name, [&[3][..], &operation::encode(&steps)].concat())
    });
    all.push(("queue", alone.collect()));
    for (target, seeds) in all {
        for (name, bytes) in seeds {
            let path = corpus.join(target).join(name);
            if write {
                std::fs::create_dir_all(corpus.join(target)).unwrap();
                std::fs::write(&path, &bytes).unwrap();
            }
            let kept = std::fs::read(&path).unwrap_or_default();
            assert!(
                kept == bytes,
                "{} is out of date; SARANG_SEEDS=write cargo test --lib in_the_corpus",
                path.display()
            );
        }
    }
}

/// Tells another thread to stop, even when this one panics.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn another_processor_that_scribbles_over_the_rings_all_the_time_brings_no_device_down() {
    for target in ALL {
        let mut machine = Machine::new(target);
        let (ram, done) = (machine.ram(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Marsaglia's xorshift.
                let mut state = 0x9e37_79b9_7f4a_7c15_u64;
                let mut random = |below| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    state % below
                };
                while !done.load(Ordering::Relaxed) {
                    rings::scribble(&ram, &mut random);
                }
            });
            let _stop = Stop(&done);
            // Until the other one has broken enough.
            for round in 0.. {
                if machine.transport.malformed() >= 100 {
                    break;
                }
                machine.apply(&Operation::Start {
                    features: if round % 2 == 0 { u64::MAX } else { 0 },
                    log: 4,
                });
                for turn in 0..20 {
                    machine.apply(&Operation::Notify { queue: turn % 2 });
                    machine.apply(&Operation::Host {
                        bytes: vec![0; 100],
                    });
                    machine.apply(&Operation::Turn);
                }
            }
        });
        machine.settle();
        machine.probe();
    }
}

/// Steps from bytes, each by itself, so that they can be left out one by one to find the shortest list that fails.
fn steps() -> impl Strategy<Value = Vec<[u8; 40]>> {
    prop::collection::vec(any::<[u8; 40]>(), 0..60)
}

fn bytes(steps: &[[u8; 40]]) -> Vec<u8> {
    let mut all = Vec::new();
    for (index, step) in steps.iter().enumerate() {
        let mut step: Vec<Operation> = operation::decode(step).take(1).collect();
        if index == 0 {
            // Otherwise most lists would be over before they had begun.
            step.insert(
                0,
                Operation::Start {
                    features: u64::MAX,
                    log: 3,
                },
            );
        }
        all.extend(operation::encode(&step));
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_driver_brings_the_registers_down(steps in steps()) {
        attack(&targets::MMIO, &bytes(&steps));
    }

    #[test]
    fn no_driver_brings_the_entropy_device_down(steps in steps()) {
        attack(&targets::RNG, &bytes(&steps));
    }

    #[test]
    fn no_driver_brings_a_disk_down(steps in steps()) {
        attack(&targets::BLOCK, &bytes(&steps));
    }

    #[test]
    fn no_driver_brings_a_network_card_down(steps in steps()) {
        attack(&targets::NET, &bytes(&steps));
    }

    #[test]
    fn no_driver_brings_a_balloon_down(steps in steps()) {
        attack(&targets::BALLOON, &bytes(&steps));
    }

    #[test]
    fn no_driver_brings_a_console_down(steps in steps()) {
        attack(&targets::CONSOLE, &bytes(&steps));
    }

    #[test]
    fn no_driver_brings_persistent_memory_down(steps in steps()) {
        attack(&targets::PMEM, &bytes(&steps));
    }

    #[test]
    fn no_driver_brings_a_shared_directory_down(steps in steps()) {
        attack(&targets::FS, &bytes(&steps));
    }

    #[test]
    fn no_driver_brings_a_socket_device_down(steps in steps()) {
        attack(&targets::VSOCK, &bytes(&steps));
    }

    #[test]
    fn whatever_lies_in_the_rings_the_queue_finds_what_the_specification_says(
        first in any::<u8>(),
        steps in steps(),
    ) {
        let mut all = vec![first];
        for step in &steps {
            all.extend(operation::encode(&[Operation::Turn]));
            let step: Vec<Operation> = operation::decode(step).take(1).collect();
            all.extend(operation::encode(&step));
        }
        walker::walk(&all);
    }

    #[test]
    fn any_bytes_are_steps(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
        let steps: Vec<Operation> = operation::decode(&bytes).collect();
        let written = operation::encode(&steps);
        let read: Vec<Operation> = operation::decode(&written).collect();
        prop_assert_eq!(read, steps);
    }
}
