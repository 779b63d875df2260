//! A report of `benches/kept.rs` for people.

use vmm::cli::units::{bytes, micros};

use super::report::KeptReport;
use crate::text::{caveats, fields, ratio, targets, titled};

/// All of `report`.
pub fn report(report: &KeptReport) -> String {
    let platform = &report.platform;
    let mut text = format!(
        "kept snapshots: {} KVM, Linux {}, {} CPUs; {} rounds each; medians, and the longest\n",
        platform.kvm, platform.kernel, platform.cpus, report.rounds
    );
    text.push_str(&caveats(platform, &report.skipped));
    let tables = [
        (
            "from the wish for a VM to its first instruction, and its first pass over memory; ratios to a \
             file that is mapped privately",
            loads(report),
        ),
        (
            "a save beside a guest that runs; ratio to the slower of a raw write and copy + hash",
            saves(report),
        ),
        (
            "speed that the guest keeps, of that without a snapshot",
            speeds(report),
        ),
        ("pause", pauses(report)),
        (
            "a save of what has changed; ratios to the full save",
            increments(report),
        ),
        ("to verify", verifies(report)),
        ("clones of one load", clones(report)),
    ];
    for (title, lines) in tables {
        text.push_str(&titled(title, &lines));
    }
    text.push('\n');
    text.push_str(&targets(&report.targets));
    text
}

fn loads(report: &KeptReport) -> Vec<Vec<String>> {
    let header = [
        "",
        "mapped",
        "max",
        "ours",
        "",
        "max",
        "all before",
        "pass, reading: mapped",
        "ours",
        "",
        "writing: mapped",
        "ours",
        "",
    ];
    let mut lines = vec![fields(header)];
    for load in &report.loads {
        let (ours, mapped) = (&load.ours, &load.mapped);
        let (first, theirs) = (ours.first_instruction_us, mapped.first_instruction_us);
        let mut fields = vec![
            bytes(load.memory),
            micros(theirs.p50),
            micros(theirs.max),
            micros(first.p50),
            ratio(first.p50, theirs.p50),
            micros(first.max),
            micros(load.whole.first_instruction_us.p50),
        ];
        for (ours, mapped) in [
            (ours.read_pass_us.p50, mapped.read_pass_us.p50),
            (ours.write_pass_us.p50, mapped.write_pass_us.p50),
        ] {
            fields.extend([micros(mapped), micros(ours), ratio(ours, mapped)]);
        }
        lines.push(fields);
    }
    lines
}

fn setting(memory: u64, vcpus: u64) -> String {
    format!("{}, {vcpus} vcpus", bytes(memory))
}

fn saves(report: &KeptReport) -> Vec<Vec<String>> {
    let header = [
        "",
        "raw write",
        "max",
        "copy + hash",
        "max",
        "save",
        "",
        "max",
    ];
    let mut lines = vec![fields(header)];
    for save in &report.saves {
        lines.push(vec![
            setting(save.memory, save.vcpus),
            micros(save.raw_write_us.p50),
            micros(save.raw_write_us.max),
            micros(save.hash_us.p50),
            micros(save.hash_us.max),
            micros(save.save_us.p50),
            ratio(save.save_us.p50, save.floor_us()),
            micros(save.save_us.max),
        ]);
    }
    lines
}

fn speeds(report: &KeptReport) -> Vec<Vec<String>> {
    let header = [
        "",
        "writes/s",
        "beside a snapshot",
        "a save",
        "a raw write",
        "copy + hash",
    ];
    let mut lines = vec![fields(header)];
    for save in &report.saves {
        let share = |share: f64| format!("{:.0}%", share * 100.0);
        lines.push(vec![
            setting(save.memory, save.vcpus),
            format!("{:.1}M", save.ops_per_s / 1e6),
            share(save.speed_snapshot),
            share(save.speed_save),
            share(save.speed_raw_write),
            share(save.speed_hash),
        ]);
    }
    lines
}

fn pauses(report: &KeptReport) -> Vec<Vec<String>> {
    let header = [
        "",
        "snapshot",
        "max",
        "for a save",
        "",
        "max",
        "meanwhile",
        "",
        "max",
    ];
    let mut lines = vec![fields(header)];
    for save in &report.saves {
        let usual = save.pause_us;
        let mut fields = vec![
            setting(save.memory, save.vcpus),
            micros(usual.p50),
            micros(usual.max),
        ];
        for pause in [save.save_pause_us, save.pause_meanwhile_us] {
            let ratio = ratio(pause.p50, usual.p50);
            fields.extend([micros(pause.p50), ratio, micros(pause.max)]);
        }
        lines.push(fields);
    }
    lines
}

fn increments(report: &KeptReport) -> Vec<Vec<String>> {
    let header = ["", "bytes", "", "time", "", "max"];
    let mut lines = vec![fields(header)];
    for cost in &report.increments {
        let changed = bytes(cost.changed);
        for (what, part) in [
            (format!("{}, all of it", bytes(cost.memory)), cost.full),
            ("nothing has changed".to_owned(), cost.nothing),
            (format!("one stretch of {changed}"), cost.stretch),
            (format!("pages anywhere, {changed}"), cost.scattered),
        ] {
            lines.push(vec![
                what,
                bytes(part.bytes),
                ratio(part.bytes as f64, cost.full.bytes as f64),
                micros(part.us.p50),
                ratio(part.us.p50, cost.full.us.p50),
                micros(part.us.max),
            ]);
        }
    }
    lines
}

fn verifies(report: &KeptReport) -> Vec<Vec<String>> {
    let header = ["", "verify", "CPU time", "GB/s a core", "one file", "b3sum"];
    let mut lines = vec![fields(header)];
    for cost in &report.verifies {
        lines.push(vec![
            bytes(cost.bytes),
            micros(cost.verify_us.p50),
            micros(cost.verify_cpu_us.p50),
            format!("{:.2}", cost.a_core() / 1e9),
            micros(cost.file_us.p50),
            cost.b3sum_us
                .map_or("-".to_owned(), |time| micros(time.p50)),
        ]);
    }
    lines
}

fn clones(report: &KeptReport) -> Vec<Vec<String>> {
    let header = [
        "",
        "clones",
        "loaded",
        "written by each",
        "in use",
        "copies",
        "private, each",
        "all run after",
    ];
    let mut lines = vec![fields(header)];
    for cost in &report.clones {
        lines.push(vec![
            bytes(cost.memory),
            cost.clones.to_string(),
            bytes(cost.copy),
            bytes(cost.written),
            bytes(cost.in_use),
            format!("{:.3}", cost.copies()),
            bytes(cost.private),
            micros(cost.us),
        ]);
    }
    lines
}
