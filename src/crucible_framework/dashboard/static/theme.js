// Before the first paint: the theme that was chosen, if one was. Loaded as a classic script, so that no wrong colour flashes up.
(() => {
  const root = document.documentElement;
  const order = ["auto", "light", "dark"];
  const apply = (theme) => {
    if (theme === "auto") delete root.dataset.theme;
    else root.dataset.theme = theme;
  };
  let theme = "auto";
  try { theme = localStorage.getItem("theme") || "auto"; } catch { /* storage may be switched off */ }
  apply(theme);
  document.addEventListener("DOMContentLoaded", () => {
    const here = document.querySelector("header nav [aria-current=page]");
    if (here) here.parentElement.scrollLeft = here.offsetLeft - (here.parentElement.clientWidth - here.offsetWidth) / 2; // the tabs scroll on a narrow screen
    const button = document.getElementById("theme");
    if (!button) return;
    const show = () => { button.textContent = `Theme: ${theme}`; };
    show();
    button.addEventListener("click", () => {
      theme = order[(order.indexOf(theme) + 1) % order.length];
      apply(theme);
      show();
      try { localStorage.setItem("theme", theme); } catch { /* not kept then */ }
    });
  });
})();
