//! `migrate show`.

use crate::{cli::Show, context::Context, engine, human, out, report};

/// Prints what a checkpoint holds.
pub fn run(arguments: &Show, context: &Context) -> anyhow::Result<u8> {
    let image = engine::show(&arguments.dir.dir, &arguments.name)?;
    if context.json {
        out::json(&image)?;
        return Ok(report::DONE);
    }
    let info = &image.info;
    let mut text = format!(
        "{}: {}\ntaken     {} on {} ({})\nsize      {}\nparent    {}\n",
        info.name,
        human::printable(&info.command),
        human::ago(info.created),
        human::printable(&image.hostname),
        human::printable(&image.kernel),
        human::bytes(info.bytes),
        info.parent.as_deref().unwrap_or("-"),
    );
    for process in &image.tree {
        text.push_str(&format!(
            "\npid {} (parent {})  {}\n  {}, {}, {} of memory\n",
            process.pid,
            process.ppid,
            human::printable(&process.command),
            human::plural(process.threads.into(), "thread", "threads"),
            human::plural(process.mappings.into(), "mapping", "mappings"),
            human::bytes(process.memory),
        ));
        for file in &process.files {
            text.push_str(&format!("  fd {}\n", human::printable(file)));
        }
    }
    out::stdout(&text)?;
    Ok(report::DONE)
}
