import type { SqlValue } from "sql.js";

/** A customer as Square sends and takes it, under Square's names; the values are not to be trusted. */
export type Customer = Record<string, unknown>;

/** A row of a table, by column. */
export type Row = Record<string, SqlValue>;

interface Field {
  column: string;
  square?: string; // Square's name, where it differs from the column's
  under?: string; // the object of Square's that it is in, such as `address`
  as?: "time" | "integer" | "list" | "flag";
  sent?: true; // goes to Square when a row is pushed; what is not sent is Square's alone to say
  longest?: number; // in characters (BulkCreateCustomerData)
  form?: (text: string) => string | undefined; // puts case and spaces right; undefined = no good
  like?: string; // what a good one looks like
}

/**
 * The two data models side by side. To carry another field, add a line here and one to schema.sql;
 * a test holds the two together.
 */
export const FIELDS: readonly Field[] = [
  { column: "id" },
  { column: "created_at", as: "time" },
  { column: "updated_at", as: "time" },
  { column: "version", as: "integer" },
  { column: "creation_source" },
  { column: "given_name", sent: true, longest: 300 },
  { column: "family_name", sent: true, longest: 300 },
  { column: "company_name", sent: true, longest: 500 },
  { column: "nickname", sent: true, longest: 100 },
  { column: "email_address", sent: true, longest: 254, form: toEmail, like: "ada@example.com" },
  { column: "phone_number", sent: true, form: toPhone, like: "+12065550100" },
  { column: "birthday", sent: true, form: toBirthday, like: "1990-04-25" },
  { column: "note", sent: true },
  { column: "reference_id", sent: true, longest: 100 },
  { column: "tax_ids_eu_vat", square: "eu_vat", under: "tax_ids", sent: true, longest: 20 },
  { column: "address_line_1", under: "address", sent: true },
  { column: "address_line_2", under: "address", sent: true },
  { column: "address_line_3", under: "address", sent: true },
  { column: "locality", under: "address", sent: true },
  { column: "sublocality", under: "address", sent: true },
  { column: "administrative_district_level_1", under: "address", sent: true },
  { column: "postal_code", under: "address", sent: true },
  { column: "country", under: "address", sent: true, form: toCountry, like: "US" },
  { column: "group_ids", as: "list" },
  { column: "segment_ids", as: "list" },
  { column: "email_unsubscribed", under: "preferences", as: "flag" },
];

// What a row is made from: objects that get their columns one by one take twice the memory.
const BLANK: Row = Object.fromEntries(FIELDS.map(({ column }) => [column, null]));

/** Square refuses a profile that has none of these, and leaves such profiles out of every search. */
const ONE_OF = ["given_name", "family_name", "company_name", "email_address", "phone_number"];

/**
 * Turns a customer from Square into a row. Nothing is dropped for being odd: an unknown word or a wrong
 * type is kept as text.
 */
export function toRow(customer: Customer): Row {
  const row = { ...BLANK };
  for (const { column, square = column, under, as } of FIELDS) {
    const parent = under === undefined ? customer : customer[under];
    row[column] = toValue(isRecord(parent) ? parent[square] : undefined, as);
  }
  return row;
}

function toValue(value: unknown, as: Field["as"]): SqlValue {
  if (as === "flag") return value === true ? 1 : 0;
  if (as === "list") return toText(value ?? []);
  if (as === "integer") return Number.isSafeInteger(value) ? Number(value) : null;
  if (value === undefined || value === null) return null;
  return as === "time" ? toTime(toText(value)) : toText(value);
}

/** Collects customers by id. Of one that came twice, the newer version stays. */
export function keepNewest(rows: Map<string, Row>, customer: Customer): void {
  const row = toRow(customer);
  const id = String(row.id);
  const kept = rows.get(id)?.version ?? Number.NEGATIVE_INFINITY;
  if (Number(row.version) >= Number(kept)) rows.set(id, row);
}

/**
 * Turns a local row into what CreateCustomer takes, and says why Square would refuse it. Blank columns
 * are left out: Square takes an unset field, not an empty one.
 */
export function toCustomer(row: Record<string, unknown>) {
  const customer: Customer = {};
  const problems: string[] = [];
  for (const { column, square = column, under, sent, longest = Infinity, form, like } of FIELDS) {
    const value = row[column] ?? "";
    if (!sent || String(value).trim() === "") continue;
    // A number is a postal code, say, that was stored without quotes. Bytes are no text.
    const text = value instanceof Uint8Array ? undefined : String(value).trim();
    const fit = text !== undefined && form ? form(text) : text;
    if (fit === undefined)
      problems.push(`${column} is not one that Square takes${like ? `, such as ${like}` : ""}`);
    else if ([...fit].length > longest)
      problems.push(`${column} is longer than ${longest} characters`);
    else if (under === undefined) customer[square] = fit;
    else customer[under] = Object.assign(customer[under] ?? {}, { [square]: fit });
  }
  if (problems.length === 0 && !ONE_OF.some((name) => name in customer))
    problems.push(`one of ${ONE_OF.join(", ")} is needed`);
  return { customer, problems };
}

// As UTC with three digits, so that text order is time order: Square drops trailing zeros, and as text
// `…44Z` comes after `…44.72Z`.
function toTime(text: string): string {
  const time = Date.parse(text);
  return Number.isNaN(time) ? text : new Date(time).toISOString();
}

/** True for a JSON object: not null, not an array. */
export function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

// SQLite's own functions end a text at its first NUL, and half a surrogate pair is not valid UTF-8.
function toText(value: unknown): string {
  const text = typeof value === "string" ? value : JSON.stringify(value);
  return text.replace(/\0|\p{Cs}/gu, "\uFFFD");
}

function toEmail(text: string): string | undefined {
  return /^[^\s@]+@[^\s@.]+(\.[^\s@.]+)+$/.test(text) ? text : undefined;
}

// 9 to 16 digits with an optional +, enforced since October 2022.
function toPhone(text: string): string | undefined {
  const phone = text.replace(/[\s().-]/g, "");
  return /^\+?\d{9,16}$/.test(phone) ? phone : undefined;
}

// YYYY-MM-DD or MM-DD; Square answers year 0000 where it is not known, and 2000 had a 29 February.
function toBirthday(text: string): string | undefined {
  const [, year = "0000", day = ""] = /^(?:(\d{4})-)?(\d{2}-\d{2})$/.exec(text) ?? [];
  const isKnown = year !== "0000";
  const date = new Date(`${isKnown ? year : "2000"}-${day}T00:00Z`);
  if (date.toJSON()?.slice(5, 10) !== day) return undefined;
  return isKnown ? `${year}-${day}` : day;
}

function toCountry(text: string): string | undefined {
  const code = text.toUpperCase();
  const regions = new Intl.DisplayNames(["en"], { type: "region", fallback: "none" });
  return /^[A-Z]{2}$/.test(code) && regions.of(code) !== undefined ? code : undefined;
}
