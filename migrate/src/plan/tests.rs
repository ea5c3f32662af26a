//! A test for each branch of the planner, and what holds whatever the numbers are.

use super::*;
use proptest::{collection::vec, prelude::*};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// 512 MiB a second: a MiB takes about 2 ms.
const RATE: f64 = (512 << 20) as f64;

fn ms(ms: f64) -> Duration {
    Duration::from_secs_f64(ms / 1e3)
}

fn limits() -> Limits {
    Limits {
        downtime: ms(20.0),
        rounds: 30,
        time: Duration::from_secs(300),
    }
}

fn planner(mode: Mode) -> Planner {
    Planner::new(limits(), mode, ms(3.0))
}

/// A round that sent `raw` at RATE and left `dirty`.
fn sent(raw: u64, dirty: u64) -> RoundFacts {
    RoundFacts {
        dirty,
        raw,
        wire: raw,
        took: duration(raw as f64 / RATE + LEAST_OVERHEAD),
        dirtied: dirty,
        ..RoundFacts::default()
    }
}

/// Plays rounds in which each sends what the one before left; `left` are the W. The decisions.
fn play(planner: &mut Planner, total: u64, left: &[u64]) -> Vec<Decision> {
    let (mut raw, mut elapsed) = (total, Duration::ZERO);
    left.iter()
        .map(|&dirty| {
            let mut facts = sent(raw, dirty);
            elapsed += facts.took;
            facts.elapsed = elapsed;
            raw = dirty;
            planner.round(facts)
        })
        .collect()
}

fn another(all: &[Decision]) -> bool {
    all.iter().all(|d| *d == Decision::Another)
}

fn frozen(decision: Decision) -> (f64, Why, Option<f64>) {
    match decision {
        Decision::Freeze { predicted, why, misses_by } => (predicted.as_secs_f64() * 1e3, why, misses_by.map(|d| d.as_secs_f64() * 1e3)),
        other => panic!("{other:?}"),
    }
}

fn lazy(decision: Decision) -> (f64, u64, Why) {
    match decision {
        Decision::GoLazy { predicted, lazy, why, .. } => (predicted.as_secs_f64() * 1e3, lazy, why),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_idle_program_is_frozen_after_one_round() {
    let d = planner(Mode::PreCopy).round(sent(GIB, 0));
    assert_eq!(frozen(d), (3.0, Why::LimitMet, None));
}

#[test]
fn rounds_go_on_below_the_limit_while_they_pay() {
    let mut p = planner(Mode::PreCopy);
    // 2 s, 200 ms, 20 ms: the limit is met with 4 MiB (11 ms), and another round makes it 4.
    let all = play(&mut p, GIB, &[100 * MIB, 12 * MIB, 4 * MIB, 512 << 10, 64 << 10]);
    assert!(another(&all[..4]), "{all:?}");
    let (predicted, why, misses) = frozen(all[4]);
    assert!(predicted < 3.2 && misses.is_none(), "{predicted}");
    assert_eq!(why, Why::LimitMet);
}

#[test]
fn a_round_that_takes_off_too_little_is_not_made() {
    // 100 KiB are 0.2 of 3.2 ms.
    let d = planner(Mode::PreCopy).round(sent(GIB, 100 << 10));
    assert_eq!(frozen(d).1, Why::LimitMet);
}

#[test]
fn two_rounds_without_a_gain_end_it_below_the_limit() {
    let mut p = planner(Mode::PreCopy);
    // D is known to be low from the long first round, so that more is hoped for than there is.
    let all = play(&mut p, 4 * GIB, &[3 * MIB, 3 * MIB, 3 * MIB]);
    assert!(another(&all[..1]), "{all:?}");
    let end = all.iter().find(|d| **d != Decision::Another).copied().unwrap();
    assert_eq!(frozen(end).1, Why::LimitMet);
}

#[test]
fn a_burst_is_waited_out() {
    let mut p = planner(Mode::PreCopy);
    let all = play(&mut p, GIB, &[100 * MIB, 2 * MIB, 7 * MIB, 32 << 10]);
    assert!(another(&all[..3]), "{all:?}");
    assert!(frozen(all[3]).0 < 3.2);
}

#[test]
fn a_dear_round_is_not_made_below_the_limit() {
    let mut p = Planner::new(
        Limits {
            downtime: Duration::from_secs(2),
            ..limits()
        },
        Mode::PreCopy,
        ms(3.0),
    );
    // 200 MiB are 400 ms, and would become little; but the limit is met, and so far only 500 ms were spent.
    let mut facts = sent(256 * MIB, 200 * MIB);
    facts.elapsed = facts.took;
    facts.dirtied = 10 * MIB;
    assert_eq!(frozen(p.round(facts)).1, Why::LimitMet);
}

#[test]
fn a_fixed_cost_over_the_limit_is_said_and_dirty_pages_still_fall_first() {
    let mut p = Planner::new(limits(), Mode::PreCopy, ms(50.0));
    let all = play(&mut p, GIB, &[100 * MIB, 10 * MIB, MIB]);
    assert!(another(&all[..2]), "{all:?}");
    let (predicted, why, misses) = frozen(all[2]);
    assert_eq!(why, Why::FixedCostAlone);
    assert!((predicted - 52.0).abs() < 0.3, "{predicted}");
    assert!((misses.unwrap() - 32.0).abs() < 0.3, "{misses:?}");
}

#[test]
fn a_fixed_cost_over_the_limit_does_not_hide_a_stall() {
    let mut p = Planner::new(limits(), Mode::PreCopy, ms(21.0));
    let all = play(&mut p, GIB, &[900 * MIB; 12]);
    let end = all.iter().find(|d| **d != Decision::Another).copied().unwrap();
    assert_eq!(frozen(end).1, Why::Stalled);
    let mut p = Planner::new(limits(), Mode::Hybrid, ms(21.0));
    let all = play(&mut p, GIB, &[900 * MIB; 12]);
    let end = all.iter().find(|d| **d != Decision::Another).copied().unwrap();
    assert!(
        matches!(end, Decision::GoLazy { why: Why::Stalled, misses_by: Some(m), .. } if m == ms(1.0)),
        "{end:?}"
    );
}

#[test]
fn the_fixed_cost_is_updated() {
    let mut p = planner(Mode::PreCopy);
    let d = p.round(RoundFacts {
        fixed: Some(ms(30.0)),
        ..sent(GIB, 0)
    });
    assert_eq!(frozen(d), (30.0, Why::FixedCostAlone, Some(10.0)));
    assert_eq!(p.fixed(), ms(30.0));
}

/// rho = 0.8 from 400 MiB: in reach, but not in three rounds.
#[test]
fn the_round_cap() {
    for mode in [Mode::PreCopy, Mode::Hybrid] {
        let mut p = Planner::new(Limits { rounds: 3, ..limits() }, mode, ms(3.0));
        let all = play(&mut p, 500 * MIB, &[400 * MIB, 320 * MIB, 256 * MIB]);
        assert!(another(&all[..1]), "{all:?}");
        match mode {
            Mode::PreCopy => {
                assert!(another(&all[..2]), "{all:?}");
                let (predicted, why, misses) = frozen(all[2]);
                assert_eq!(why, Why::RoundCap);
                assert!(
                    (predicted - 503.0).abs() < 2.0 && (misses.unwrap() - 483.0).abs() < 2.0,
                    "{predicted}"
                );
            }
            // Out of reach already after the second round, which is at a minimum.
            _ => assert_eq!(lazy(all[1]), (3.0, 320 * MIB, Why::Stalled)),
        }
    }
    // One round and no more.
    let mut p = Planner::new(Limits { rounds: 1, ..limits() }, Mode::Hybrid, ms(3.0));
    assert_eq!(lazy(p.round(sent(GIB, 100 * MIB))), (3.0, 100 * MIB, Why::RoundCap));
    let mut p = Planner::new(Limits { rounds: 0, ..limits() }, Mode::PreCopy, ms(3.0));
    assert_eq!(frozen(p.round(sent(GIB, 100 * MIB))).1, Why::RoundCap);
    // With the limit met the cap is nobody's reason.
    let mut p = Planner::new(Limits { rounds: 1, ..limits() }, Mode::PreCopy, ms(3.0));
    assert_eq!(frozen(p.round(sent(GIB, 4 * MIB))).1, Why::LimitMet);
}

#[test]
fn the_time_cap_ends_the_round_before_it() {
    let second = Limits {
        time: Duration::from_secs(3),
        ..limits()
    };
    // 2 s gone; 600 MiB would take 1.2.
    let facts = RoundFacts {
        elapsed: Duration::from_secs(2),
        ..sent(GIB, 600 * MIB)
    };
    let (_, why, misses) = frozen(Planner::new(second, Mode::PreCopy, ms(3.0)).round(facts));
    assert_eq!(why, Why::TimeCap);
    assert!(misses.is_some());
    assert_eq!(
        lazy(Planner::new(second, Mode::Hybrid, ms(3.0)).round(facts)),
        (3.0, 600 * MIB, Why::TimeCap)
    );
}

#[test]
fn hybrid_goes_lazy_at_a_minimum_of_what_is_dirty() {
    // rho is 0.9 from the start, but one W is no minimum; the third is higher than the second.
    let mut p = planner(Mode::Hybrid);
    let all = play(&mut p, 200 * MIB, &[190 * MIB, 230 * MIB, 180 * MIB]);
    assert!(another(&all[..2]), "{all:?}");
    assert_eq!(lazy(all[2]), (3.0, 180 * MIB, Why::Stalled));
}

#[test]
fn hybrid_does_not_wait_for_a_minimum_for_ever() {
    let mut p = planner(Mode::Hybrid);
    let rising: Vec<u64> = (0..10).map(|i| (200 + 40 * i) * MIB).collect();
    let all = play(&mut p, 200 * MIB, &rising);
    assert_eq!(all.iter().position(|d| *d != Decision::Another), Some(PATIENCE as usize), "{all:?}");
}

#[test]
fn w_that_falls_slowly_twice_is_a_stall_whatever_rho_says() {
    let mut p = planner(Mode::Hybrid);
    // Dirtied is little each round (rho 0.1), but what waits stays: hot pages that are held back.
    let mut decisions = Vec::new();
    for _ in 0..3 {
        decisions.push(p.round(RoundFacts {
            dirtied: 2 * MIB,
            held: 99 * MIB,
            took: ms(40.0),
            ..sent(20 * MIB, 100 * MIB)
        }));
    }
    assert!(p.rho() < 0.2, "{}", p.rho());
    assert!(another(&decisions[..2]), "{decisions:?}");
    assert_eq!(lazy(decisions[2]).2, Why::Stalled);
}

#[test]
fn pre_copy_goes_on_to_the_cap_while_it_shrinks() {
    let mut p = Planner::new(Limits { rounds: 12, ..limits() }, Mode::PreCopy, ms(3.0));
    // By 8 % a round: stalled by every rule, and yet each round takes something off.
    let left: Vec<u64> = (0..12).map(|i| (900.0 * 0.92_f64.powi(i)) as u64 * MIB).collect();
    let all = play(&mut p, GIB, &left);
    assert!(another(&all[..11]), "{all:?}");
    assert_eq!(frozen(all[11]).1, Why::RoundCap);
}

#[test]
fn pre_copy_freezes_at_a_minimum_when_it_does_not_shrink_at_all() {
    let mut p = planner(Mode::PreCopy);
    let left = [800, 900, 950, 1000, 900, 810].map(|m| m * MIB);
    let all = play(&mut p, GIB, &left);
    assert!(another(&all[..4]), "{all:?}");
    // 900 is the least of the last three.
    let (predicted, why, misses) = frozen(all[4]);
    assert_eq!(why, Why::Stalled);
    assert!(
        (predicted - 1761.0).abs() < 5.0 && (misses.unwrap() - 1741.0).abs() < 5.0,
        "{predicted}"
    );
}

#[test]
fn pre_copy_does_not_wait_for_a_minimum_for_ever() {
    let mut p = planner(Mode::PreCopy);
    let rising: Vec<u64> = (0..12).map(|i| (800 + 100 * i) * MIB).collect();
    let all = play(&mut p, GIB, &rising);
    let end = all.iter().position(|d| *d != Decision::Another).unwrap();
    assert_eq!(end as u32, FLAT + PATIENCE);
    assert_eq!(frozen(all[end]).1, Why::Stalled);
}

#[test]
fn small_rounds_say_little_about_the_rate() {
    let mut p = planner(Mode::PreCopy);
    p.round(sent(GIB, 100 * MIB));
    p.round(sent(100 * MIB, MIB));
    for _ in 0..4 {
        // 200 KiB in 1.5 ms: the round trip.
        p.round(RoundFacts {
            took: ms(1.5),
            ..sent(200 << 10, 200 << 10)
        });
    }
    assert!(p.rate() > 0.99 * RATE, "{}", p.rate());
    // Nor does one hiccup, but a link that became slow does.
    p.round(RoundFacts {
        took: Duration::from_secs(5),
        ..sent(7 * MIB, 100 * MIB)
    });
    assert!(p.rate() > 0.99 * RATE, "{}", p.rate());
    for _ in 0..2 {
        p.round(RoundFacts {
            took: Duration::from_secs(5),
            ..sent(100 * MIB, 100 * MIB)
        });
    }
    assert!(p.rate() < 25e6, "{}", p.rate());
}

#[test]
fn the_link_s_own_rate_counts() {
    let mut p = planner(Mode::PreCopy);
    p.round(RoundFacts {
        rate: Some(1e9),
        ..sent(GIB, MIB)
    });
    assert_eq!(p.rate(), 1e9);
    for nonsense in [f64::NAN, f64::INFINITY, 0.0, -5.0] {
        let mut p = planner(Mode::PreCopy);
        p.round(RoundFacts {
            rate: Some(nonsense),
            ..sent(GIB, MIB)
        });
        assert!((p.rate() / RATE - 1.0).abs() < 0.01, "{}", p.rate());
    }
}

#[test]
fn compression_counts_in_the_prediction() {
    let mut p = planner(Mode::PreCopy);
    let mut facts = sent(GIB, 30 * MIB);
    facts.wire /= 4;
    facts.took /= 4;
    p.round(facts);
    assert_eq!(p.ratio(), 0.25);
    let predicted = p.predicted().as_secs_f64() * 1e3;
    assert!((predicted - (3.0 + 7.5 * 1e3 / 512.0)).abs() < 0.1, "{predicted}");
}

#[test]
fn nothing_measured_yet() {
    let mut p = planner(Mode::Hybrid);
    assert_eq!((p.predicted(), p.rounds(), p.dirty_rate(), p.ratio()), (ms(3.0), 0, 0.0, 1.0));
    // A program of zeros: nothing was sent, in no time.
    let d = p.round(RoundFacts::default());
    assert_eq!(frozen(d), (3.0, Why::LimitMet, None));
    assert_eq!(p.rate(), UNKNOWN_RATE);
}

#[test]
fn names_are_those_of_the_reports() {
    let all = [Why::LimitMet, Why::FixedCostAlone, Why::Stalled, Why::RoundCap, Why::TimeCap];
    assert_eq!(all.map(Why::name), ["limit-met", "fixed-cost", "stalled", "round-cap", "time-cap"]);
}

// Forecasts.

fn outlook(total: u64, rate: f64) -> Outlook {
    Outlook {
        total,
        activity: Activity {
            rate,
            working_set: total as f64,
        },
        ratio: 1.0,
        rate: 500e6,
        fixed: ms(3.0),
        overhead: ms(1.0),
        first: ms(0.0),
    }
}

/// The first round alone is longer, and so is what the program writes in it.
#[test]
fn what_the_first_round_costs_counts_once() {
    let limits = limits();
    let plain = outlook(16 << 20, 50e6);
    let late = Outlook { first: ms(40.0), ..plain };
    let [plain, late] = [plain, late].map(|o| forecast(limits, Mode::PreCopy, &o));
    assert_eq!(late.sent[0].1 - plain.sent[0].1, ms(40.0));
    assert!(late.sent[1].0 > plain.sent[1].0);
    assert!((ms(40.0)..ms(50.0)).contains(&(late.total - plain.total)), "{late:?} and {plain:?}");
}

#[test]
fn a_gibibyte_at_50_mb_a_second_is_frozen_for_milliseconds() {
    for mode in [Mode::PreCopy, Mode::Hybrid] {
        let f = forecast(limits(), mode, &outlook(GIB, 50e6));
        assert_eq!(f.why, Some(Why::LimitMet));
        assert!(f.downtime < ms(3.6) && f.lazy == 0 && f.misses_by.is_none(), "{f:?}");
        assert!(f.rounds <= 7, "{f:?}");
        assert!(f.total > Duration::from_secs(2) && f.total < Duration::from_millis(2600), "{f:?}");
    }
    // The size matters for the rounds alone.
    let large = forecast(limits(), Mode::PreCopy, &outlook(8 * GIB, 50e6));
    assert!(large.downtime < ms(3.6), "{large:?}");
}

#[test]
fn a_program_that_outruns_the_link() {
    let f = forecast(limits(), Mode::Hybrid, &outlook(GIB, 700e6));
    assert_eq!(f.why, Some(Why::Stalled));
    assert!(f.downtime == ms(3.0) && f.lazy > 0, "{f:?}");
    let f = forecast(limits(), Mode::PreCopy, &outlook(GIB, 700e6));
    assert_eq!(f.why, Some(Why::Stalled));
    assert!(f.misses_by.is_some_and(|m| m + ms(20.0) == f.downtime), "{f:?}");
    // A small working set settles however fast it is written.
    let mut hot = outlook(GIB, 5e9);
    hot.activity.working_set = 4e6;
    let f = forecast(limits(), Mode::PreCopy, &hot);
    assert_eq!(f.why, Some(Why::LimitMet));
    assert!(f.downtime > ms(10.0) && f.downtime < ms(11.1), "{f:?}");
}

#[test]
fn modes_without_rounds() {
    let f = forecast(limits(), Mode::Stop, &outlook(GIB, 50e6));
    assert_eq!((f.rounds, f.why, f.lazy), (0, None, 0));
    assert!(f.downtime > Duration::from_secs(2) && f.misses_by.is_some(), "{f:?}");
    let f = forecast(limits(), Mode::PostCopy, &outlook(GIB, 50e6));
    assert_eq!((f.rounds, f.why, f.lazy, f.downtime, f.misses_by), (0, None, GIB, ms(3.0), None));
}

#[test]
fn activity_from_a_sample() {
    let known = Activity {
        rate: 80e6,
        working_set: 30e6,
    };
    let (short, long) = (ms(10.0), ms(400.0));
    let count = |s: f64| known.dirtied(s) as u64;
    let fit = Activity::from_samples((short, count(0.01)), (long, count(0.4)), GIB);
    assert!((fit.rate / known.rate - 1.0).abs() < 0.02, "{fit:?}");
    assert!((fit.working_set / known.working_set - 1.0).abs() < 0.02, "{fit:?}");
    // Without an end in sight the whole program is the working set.
    let fit = Activity::from_samples((short, 500_000), (long, 20_000_000), GIB);
    assert!(fit.working_set == GIB as f64 && (fit.rate / 50e6 - 1.0).abs() < 0.02, "{fit:?}");
    // In order through all of a small memory: what it writes in a tenth of a second is not overestimated by much.
    let fit = Activity::from_samples((ms(60.0), 3_000_000), (ms(500.0), 16_000_000), 16_000_000);
    assert!((fit.dirtied(0.1) / 5e6 - 1.0).abs() < 0.2, "{fit:?}");
    // Nothing more came in the long window.
    let fit = Activity::from_samples((short, 10_000_000), (long, 10_000_000), GIB);
    assert!((fit.dirtied(1.0) / 10e6 - 1.0).abs() < 0.01, "{fit:?}");
    // A burst that the short window has missed.
    let fit = Activity::from_samples((short, 0), (long, 4_000_000), GIB);
    assert!((fit.rate / 10e6 - 1.0).abs() < 0.01, "{fit:?}");
    assert_eq!(Activity::from_samples((short, 0), (long, 0), GIB).dirtied(1.0), 0.0);
}

#[test]
fn compression_pays_where_the_link_is_slower() {
    // 1 Gbit/s against 800 MB/s of zstd: yes, with cores to spare or not. 1 GB/s: no.
    assert!(compress_pays(0.4, 800e6, 125e6, false));
    assert!(compress_pays(0.4, 800e6, 125e6, true));
    assert!(!compress_pays(0.4, 800e6, 1e9, false));
    // In between it depends on the cores.
    assert!(compress_pays(0.4, 800e6, 500e6, false));
    assert!(!compress_pays(0.4, 800e6, 500e6, true));
    // Random data, and a gain within the error.
    assert!(!compress_pays(1.0, 800e6, 125e6, false));
    assert!(!compress_pays(0.95, 8e9, 125e6, false));
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(!compress_pays(bad, 8e8, 1e8, false));
        assert!(!compress_pays(0.5, bad, 1e8, false));
        assert!(!compress_pays(0.5, 8e8, bad, false));
    }
}

// Whatever the numbers are.

fn mode() -> impl Strategy<Value = Mode> {
    prop_oneof![Just(Mode::PreCopy), Just(Mode::Hybrid)]
}

fn time(up_to_s: f64) -> impl Strategy<Value = Duration> {
    prop_oneof![
        Just(Duration::ZERO),
        (0.0..up_to_s).prop_map(Duration::from_secs_f64),
        (0.0..0.02).prop_map(Duration::from_secs_f64)
    ]
}

fn bytes() -> impl Strategy<Value = u64> {
    prop_oneof![3 => 0u64..4 * GIB, 3 => 0u64..MIB, 1 => Just(0), 1 => any::<u64>()]
}

fn limit() -> impl Strategy<Value = Limits> {
    (time(1.0), 0u32..40, time(600.0)).prop_map(|(downtime, rounds, time)| Limits { downtime, rounds, time })
}

fn facts() -> impl Strategy<Value = RoundFacts> {
    let rate = prop_oneof![Just(None), Just(Some(f64::NAN)), Just(Some(0.0)), (1.0..1e10).prop_map(Some)];
    let counts = (bytes(), bytes(), bytes(), bytes(), bytes());
    (counts, time(10.0), rate, proptest::option::of(time(0.1))).prop_map(|((dirty, held, raw, wire, dirtied), took, rate, fixed)| {
        RoundFacts {
            dirty,
            held,
            raw,
            wire,
            took,
            rate,
            dirtied,
            fixed,
            elapsed: took,
        }
    })
}

proptest! {
    #[test]
    fn decisions_hold_together(limits in limit(), mode in mode(), fixed in time(0.1), rounds in vec(facts(), 1..60)) {
        let mut p = Planner::new(limits, mode, fixed);
        let (mut elapsed, mut ended) = (Duration::ZERO, None);
        for (i, mut round) in rounds.into_iter().enumerate() {
            elapsed += round.took;
            round.elapsed = elapsed;
            let decision = p.round(round);
            let (predicted, why, misses_by) = match decision {
                Decision::Another => {
                    prop_assert!((i as u32 + 1) < limits.rounds, "beyond the cap of {}", limits.rounds);
                    prop_assert!(elapsed <= limits.time, "beyond the time");
                    continue;
                }
                Decision::Freeze { predicted, why, misses_by } => {
                    prop_assert_eq!(predicted, p.predicted());
                    if mode == Mode::Hybrid {
                        prop_assert!(matches!(why, Why::LimitMet | Why::FixedCostAlone), "{:?}", why);
                    }
                    (predicted, why, misses_by)
                }
                Decision::GoLazy { predicted, lazy, why, misses_by } => {
                    prop_assert_eq!(mode, Mode::Hybrid);
                    prop_assert_eq!(lazy, round.dirty);
                    (predicted, why, misses_by)
                }
            };
            prop_assert!(predicted >= p.fixed());
            prop_assert_eq!(misses_by.is_some(), predicted > limits.downtime);
            prop_assert_eq!(misses_by.unwrap_or_default(), predicted.saturating_sub(limits.downtime));
            prop_assert_eq!(why == Why::LimitMet, p.predicted() <= limits.downtime);
            prop_assert!(why != Why::FixedCostAlone || p.fixed() >= limits.downtime);
            ended = Some(i as u32 + 1);
            break;
        }
        if let Some(ended) = ended {
            prop_assert!(ended <= limits.rounds.max(1));
        }
        prop_assert!(p.rate() > 0.0 && p.rate().is_finite());
    }

    #[test]
    fn forecasts_end(
        limits in limit(), mode in mode(), total in bytes(), rate in 0.0..4e9, set in 0.0..8e9, ratio in 0.0..1.2, link in 0.0..2e9, fixed in time(0.1),
        without_caps in any::<bool>(),
    ) {
        let mut limits = limits;
        if without_caps {
            limits.rounds = u32::MAX;
            limits.time = Duration::from_secs(1 << 40);
        }
        let outlook = Outlook { total, activity: Activity { rate, working_set: set }, ratio, rate: link, fixed, overhead: Duration::ZERO, first: Duration::ZERO };
        let f = forecast(limits, mode, &outlook);
        prop_assert!(f.rounds >= 1 && f.rounds <= limits.rounds.clamp(1, 500), "{:?}", f);
        prop_assert!(f.downtime >= duration(fixed.as_secs_f64()) && f.total >= f.downtime, "{:?}", f);
        prop_assert!(mode == Mode::Hybrid || f.lazy == 0);
    }

    #[test]
    fn a_slower_writer_is_never_frozen_for_much_longer(rate in 1e6..1e9, total in MIB..4 * GIB) {
        let fast = forecast(limits(), Mode::PreCopy, &outlook(total, rate));
        let slow = forecast(limits(), Mode::PreCopy, &outlook(total, rate / 2.0));
        // The rounds end at slightly different points: within what counts as no clear gain.
        prop_assert!(slow.downtime.as_secs_f64() <= fast.downtime.as_secs_f64() * 1.3 + NOTICEABLE, "{:?} {:?}", slow, fast);
    }

    #[test]
    fn samples_give_usable_activities(short in time(1.0), long in time(1.0), first in bytes(), second in bytes(), total in bytes()) {
        let a = Activity::from_samples((short, first), (long, second), total);
        prop_assert!(a.rate >= 0.0 && a.rate.is_finite() && a.working_set >= 0.0 && a.working_set.is_finite(), "{:?}", a);
        prop_assert!(a.dirtied(1.0) >= 0.0);
    }
}
