/** What a run of a script knows: its settings, when it began, and how to report to the person. */

/** The Square account that a run works with. */
export interface SquareSettings {
  /** The name that is printed and stored: `sandbox`, `production`, or `offline` for SQUARE_BASE_URL. */
  environment: string;
  token: string;
  /** For example `https://connect.squareup.com`, without a slash at the end. */
  baseUrl: string;
}

/** What was sent to Square so far in this run. The strict `fetch` counts it. */
export interface Traffic {
  requests: number;
  retries: number;
  /** Requests after which we cannot know what Square did, for example because the reply was lost. */
  unknownOutcomes: number;
}

export interface RunContext {
  /** The name of the script, such as `pull-created`. */
  script: string;
  /** The SQLite file, as the user named it. */
  databasePath: string;
  square: SquareSettings;
  /**
   * When the run began, in milliseconds since 1970: before the first request, by this computer's clock or
   * by Square's, whichever is earlier. The strict `fetch` lowers it when Square's clock is behind.
   */
  startedAt: number;
  traffic: Traffic;
  /** Prints a warning to stderr, unless --quiet is set. */
  warn(text: string): void;
  /** Prints a detail such as a retry to stderr: with --verbose, or on a terminal without --quiet. */
  note(text: string): void;
  /** Shows a progress bar on a terminal. */
  showProgress(done: number, total: number): void;
  /**
   * The command that runs another script of the kit from where the user stands, such as
   * `npm run init-db`, or undefined when that script does not exist next to this one.
   */
  commandFor(script: string, args?: string): string | undefined;
}
