// The progress of a job, in words.
import { number, say } from "./words.mjs";

const LOSS = { minimumFractionDigits: 4, maximumFractionDigits: 4 };

/** Megabytes as gigabytes, with one decimal. */
export const gigabytes = (megabytes) => number(megabytes / 1000, { minimumFractionDigits: 1, maximumFractionDigits: 1 });

/** What a job is doing: its activity if it is known, otherwise its state. */
export function doing(job) {
  const { activity, activity_done: done, activity_total: total } = job;
  if (!activity) return say(job.state);
  if (activity === "waiting for memory" && total) {
    return say("waiting for memory: {free} of {needed} GB are free", { free: gigabytes(done), needed: gigabytes(total) });
  }
  return total ? say("{activity} {done} of {total}", { activity: say(activity), done, total }) : say(activity);
}

function timeLeft(seconds) {
  const minutes = Math.floor(seconds / 60);
  if (minutes >= 60) {
    return say("{hours} h {minutes} min left", { hours: Math.floor(minutes / 60), minutes: minutes % 60 });
  }
  return minutes ? say("{minutes} min left", { minutes })
    : say("{seconds} s left", { seconds: Math.ceil(seconds) });
}

/** Step, loss, time left or the finished LoRA, and message. */
export function facts(job) {
  const isEarly = job.state === "done" && job.step < job.steps;
  const words = [isEarly ? say("finished early: step {step} of {steps}", job) : say("step {step} of {steps}", job)];
  if (job.loss != null) words.push(say("loss {loss}", { loss: number(job.loss, LOSS) }));
  if (job.seconds_left != null) words.push(timeLeft(job.seconds_left));
  if (job.state === "done") words.push(say("Finished: {name}", { name: job.lora_name }));
  if (job.message && !job.activity) words.push(say(job.message)); // known ones are translated
  return words.join(" · ");
}
